"""Hold a conversation: its history, the prompt that fits the context, and answers that are safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import replace

from qwenq.errors import UsageError
from qwenq.models.chatml import Message, build_context
from qwenq.models.qwen_tokenizer import QwenTokenizer
from qwenq.models.tokenizer import Tokenizer
from qwenq.runtime.generation import Engine, Timing
from qwenq.runtime.sampling import GREEDY, Sampling

_ROOM = 256  # tokens: a cache grows in such steps, so that a short answer does not copy it


class Session:
    """Answers prompts one at a time; ``timing`` has the tokens and seconds of all answers so far."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._cache = engine.new_cache(1, _ROOM)
        self._ids: list[int] = []  # what was given to the engine; the cache holds its beginning
        self.timing = Timing()

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Yield the tokens of one answer; a caller that stops early may go on with another prompt."""
        if not prompt:
            raise UsageError("an empty prompt: there is nothing to go on from")
        kept = self._rewind_to(prompt)
        needed = len(prompt) + max_new_tokens
        self._cache.reserve(-(-needed // _ROOM) * _ROOM)
        self._ids = list(prompt)
        fresh = prompt[kept:]
        for token in self.engine.stream(fresh, max_new_tokens, sampling, stop_ids, self._cache, self.timing):
            self._ids.append(token)
            yield token

    def _rewind_to(self, prompt: Sequence[int]) -> int:
        """Keep what cache and prompt share; return how many tokens that is. The last is always computed."""
        held = self._ids[: self._cache.lengths[0]]
        pairs = enumerate(zip(held, prompt[:-1], strict=False))
        shared = next((place for place, (old, new) in pairs if old != new), min(len(held), len(prompt) - 1))
        # Qwen v1 would have rotated a longer prompt by another base: nothing of the cache can be kept then.
        if self.engine.prompt_alpha(len(prompt)) != self._cache.alphas[0]:
            shared = 0
        if not self._cache.can_rewind(0, shared):  # a recurrent state is that of its last token alone
            shared = 0
        self._cache.rewind(shared)
        return shared


ANSWER, THOUGHTS = 512, 32_768
"""Most new tokens of an answer; and of thoughts and answer together, as Qwen3's cards recommend."""
_LEAST_ROOM = 16  # tokens that an answer has at least, else the question does not fit


class Conversation:
    """Questions and answers over one session; without a ``system`` message the template has its own.

    Attributes:
        dropped_rounds: how many of the oldest rounds did not fit into the latest prompt.
        cut: whether the latest answer reached its limit of tokens.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        sampling: Sampling,
        max_new_tokens: int,
    ) -> None:
        require_chat(tokenizer)
        self._session, self._tokenizer = session, tokenizer
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._rounds: list[list[Message]] = []
        self.dropped_rounds = 0
        self.cut = False

    def ask(self, question: str) -> Generator[str]:
        """Yield the answer, piece by piece, as text without control characters.

        An answer that is cut short (the caller stops reading, or is interrupted) stays in the history as far
        as it came; a question that got no answer at all, such as one that is too long, is forgotten.
        """
        self._rounds.append([{"role": "user", "content": question}])
        ids: list[int] = []
        self.cut = False
        try:
            prompt, room = self._prompt()
            text = self._tokenizer.stream()
            stops = self._tokenizer.eos_ids
            # Every answer draws other numbers: the same ones again would favour the same words.
            sampling = replace(self._sampling, seed=self._sampling.seed + len(self._rounds) - 1)
            for token in self._session.answer(prompt, room, sampling=sampling, stop_ids=stops):
                ids.append(token)
                yield printable(text.push(token))
            self.cut = len(ids) >= room
            yield printable(text.finish())
        finally:
            self._remember(ids)

    @property
    def timing(self) -> Timing:
        """Return tokens and seconds of all answers so far."""
        return self._session.timing

    def clear(self) -> None:
        """Forget all rounds so far; the system message stays."""
        self._rounds.clear()
        self.dropped_rounds = 0

    def _remember(self, ids: list[int]) -> None:
        if ids:
            self._rounds[-1].append({"role": "assistant", "content": self._tokenizer.decode(ids)})
        else:
            self._rounds.pop()

    def _prompt(self) -> tuple[list[int], int]:
        """Return the prompt's ids, without the oldest rounds if it must, and how many new tokens fit."""
        context = self._session.engine.context
        # Room for a whole answer where possible; a model with a short context keeps half of it for history.
        wanted = self._max_new_tokens if context is None else min(self._max_new_tokens, context // 2)
        dropped = 0
        while True:
            ids, dropped_by_window = self._encode(self._rounds[dropped:])
            room = self._max_new_tokens if context is None else context - len(ids)
            if room >= wanted or dropped + dropped_by_window >= len(self._rounds) - 1:
                break
            dropped += dropped_by_window + 1
        self.dropped_rounds = dropped + dropped_by_window
        if room < _LEAST_ROOM and room < self._max_new_tokens:
            raise UsageError(
                f"the question makes a prompt of {len(ids)} tokens; the model takes {context}",
                hint="ask it in fewer words" + (", or shorten --system" if self._system else ""),
            )
        return ids, min(room, self._max_new_tokens)

    def _encode(self, rounds: list[list[Message]]) -> tuple[list[int], int]:
        """Return ids, and how many of these rounds Qwen v1's window left out."""
        messages = [*self._system, *(message for turns in rounds for message in turns)]
        if isinstance(self._tokenizer, QwenTokenizer):
            context = build_context(self._tokenizer, messages, max_window=self._tokenizer.max_window)
            return context.ids, context.dropped_rounds
        return self._tokenizer.chat(messages), 0


def require_chat(tokenizer: Tokenizer) -> None:
    """Refuse a base model, which was not trained to answer."""
    if isinstance(tokenizer, QwenTokenizer):
        if tokenizer.im_end_id in tokenizer.eos_ids:
            return
        raise UsageError(
            "this is a base model: it continues text and does not answer",
            hint="name its -Chat sibling, e.g. Qwen-1.8B-Chat",
        )
    tokenizer.chat([{"role": "user", "content": "?"}])  # raises with what is missing


def thinking_in_chat(tokenizer: Tokenizer, wish: str) -> tuple[Tokenizer, bool]:
    """Return the tokenizer with ``enable_thinking`` as asked for, and whether the model thinks then.

    ``auto`` leaves it to the chat template; a wish that the template cannot fulfil is refused.
    """
    kind = tokenizer.thinking
    if kind == "switch" and wish == "auto":
        prompt = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "?"}]))
        return tokenizer, not prompt.rstrip().endswith("</think>")
    if wish == "auto" or (kind, wish) in {("always", "on"), ("never", "off")}:
        return tokenizer, kind == "always"
    if kind == "always":
        raise UsageError("this model's chat template opens <think> in every prompt", where="--thinking")
    return tokenizer.with_thinking(wish == "on"), wish == "on"


def printable(text: str) -> str:
    """Return text without control characters but line ends and tabs: no answer can steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
