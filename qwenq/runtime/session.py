"""Answer one prompt after another over one cache: what they share is computed once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qwenq.errors import UsageError
from qwenq.runtime.cached_engine import Engine
from qwenq.runtime.generation import Timing
from qwenq.runtime.sampling import GREEDY, Sampling

_ROOM = 256  # tokens: a cache grows in such steps, so that a short answer does not copy it


class Session:
    """Answers prompts one at a time.

    Args:
        engine: what runs.

    Attributes:
        timing: tokens and seconds of all answers so far.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cache = engine.new_cache(1, _ROOM)
        self._ids: list[int] = []  # what was given to the engine; the cache holds its beginning
        self.timing = Timing()

    @property
    def engine(self) -> Engine:
        """What runs."""
        return self._engine

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Yield the tokens of one answer; a caller that stops early may go on with another prompt.

        Raises:
            UsageError: an empty prompt, no token was asked for, or ids that the model does not know.
        """
        if not prompt:
            raise UsageError("an empty prompt: there is nothing to go on from")
        kept = self._rewind_to(prompt)
        needed = len(prompt) + max_new_tokens
        self._cache.reserve(-(-needed // _ROOM) * _ROOM)
        self._ids = list(prompt)
        fresh = prompt[kept:]
        for token in self._engine.stream(fresh, max_new_tokens, sampling, stop_ids, self._cache, self.timing):
            self._ids.append(token)
            yield token

    def _rewind_to(self, prompt: Sequence[int]) -> int:
        """Keep what cache and prompt share; return how many tokens that is. The last is always computed."""
        held = self._ids[: self._cache.lengths[0]]
        pairs = enumerate(zip(held, prompt[:-1], strict=False))
        shared = next((place for place, (old, new) in pairs if old != new), min(len(held), len(prompt) - 1))
        # Qwen v1 would have rotated a longer prompt by another base: nothing of the cache can be kept then.
        if self._engine.prompt_alpha(len(prompt)) != self._cache.alphas[0]:
            shared = 0
        if not self._cache.can_rewind(0, shared):  # a recurrent state is that of its last token alone
            shared = 0
        self._cache.rewind(shared)
        return shared
