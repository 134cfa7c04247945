"""Run prompts and decode steps over a cache, and generate text with them: what all engines share."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwenq.errors import ModelError, UsageError
from qwenq.runtime.cache import LOWER, KVCache
from qwenq.runtime.memory import explained
from qwenq.runtime.sampling import GREEDY, Sampler, Sampling


def sum_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    """Sum products of float16 on a GPU in float32 to the end: by default parts may be joined in float16.

    A switch of the whole process.
    """
    if device.type == "cuda" and dtype is torch.float16:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def checked(logits: Tensor, dtype: torch.dtype, *, prompt: bool) -> Tensor:
    """Return the logits, once they are sure to be finite.

    float16 ends at 65504, so there the logits of every prompt are looked at; with ``--debug`` those
    of every step in every dtype.
    """
    wanted = (prompt and dtype is torch.float16) or bool(os.environ.get("QWENQ_DEBUG"))
    if wanted and not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"the logits hold NaN or Inf: activations overflow {str(dtype).removeprefix('torch.')}",
            where="--dtype",
            hint="use --dtype bfloat16, or float32 where the device has no bfloat16",
        )
    return logits


OnToken = Callable[[int, int], None]
"""Called with (row, id) for every token that is kept, as soon as it is known."""


@dataclass
class Timing:
    """Tokens and wall seconds, prefill and decode apart. The first new token belongs to the prefill."""

    prefill_tokens: int = 0  # prompt tokens that were computed (not those found in a cache)
    prefill_seconds: float = 0.0
    decode_tokens: int = 0  # tokens from decode steps, all rows
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Answer:
    """The answer of one row of a batch."""

    ids: list[int]  # new tokens, without the stop id that ended them
    stop_id: int | None  # that id; None when the token limit came first


@dataclass(frozen=True)
class Generated:
    """The answers in the order of the prompts, and how long they took."""

    answers: list[Answer]
    timing: Timing = field(default_factory=Timing)


class stopwatch:  # noqa: N801 - reads as a statement
    """Wall seconds of a block; work that a GPU was given is waited for, before it and at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, 0.0

    def __enter__(self) -> stopwatch:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def timed(call: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    """Return the seconds of each of some calls, after one that warms up."""
    seconds = []
    for _ in range(repetitions + 1):
        with stopwatch(device) as watch:
            call()
        seconds.append(watch.seconds)
    return seconds[1:]


class Engine(ABC):
    """Runs a model over a cache. Every method works on a batch whose rows may differ in length."""

    name: str  # ``fast`` or ``transformers``
    implementation: str  # what exactly runs, for the row of a table: kernel, attention, package versions
    # one line for each choice at load that a user should know: a faster kernel that is not used, and why
    notes: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype  # of the activations
    vocab_size: int  # columns of the logits
    real_vocab: int  # ids from here on are padding and are never sampled
    context: int | None  # tokens that the model was made for; None where the config has no limit
    _form: tuple[int, int, int, torch.dtype] | None = None

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache for ``batch`` rows of at most ``capacity`` tokens."""

    @abstractmethod
    def forward(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Add ``counts[r]`` tokens to each row r of a cache; return what is behind the last norm.

        Args:
            ids: int64 [batch, tokens]; behind a row's count, anything.
            counts: at least one for each row.
            cache: what came before.

        Returns:
            [batch, tokens, hidden], meaningless behind a row's count.
        """

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., vocabulary] of such hidden states [..., hidden]."""

    def prompt_alpha(self, tokens: int) -> int:
        """Return Qwen v1's NTK factor for a prompt of that length (see ``rope``); 1 everywhere else.

        A cache whose ``alphas`` differ from it cannot stand for the beginning of such a prompt.
        """
        del tokens
        return 1

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Add a prompt to each row of a cache; the head is computed at the last token of each alone.

        Returns:
            Float32 [len(prompts), vocabulary] after each prompt's last token.

        Raises:
            UsageError: a prompt is empty, holds an id that is not in the vocabulary, or does not fit.
        """
        self._check(prompts, cache)
        with self._memory(prompts):
            hidden = self._prompt_hidden(prompts, cache)
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
            logits = self.head(hidden[torch.arange(len(prompts), device=self.device), last])
            return checked(logits, self.dtype, prompt=True)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Add one token to each row, int64 [batch], and return float32 [batch, vocabulary] after it."""
        self._check_step(tokens, cache)
        with self._step_memory(cache):
            hidden = self.forward(tokens.unsqueeze(1), [1] * len(tokens), cache)
            return checked(self.head(hidden[:, 0]), self.dtype, prompt=False)

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Sequence[int]], cache: KVCache | None = None) -> list[Tensor]:
        """Return float32 [len(prompts[r]), vocabulary] after every token of each row; fill the cache."""
        cache = cache or self.new_cache(len(prompts), max(map(len, prompts), default=1))
        self._check(prompts, cache)
        with self._memory(prompts):
            hidden = self._prompt_hidden(prompts, cache)
            heads = (self.head(row[: len(prompt)]) for row, prompt in zip(hidden, prompts, strict=True))
            return [checked(logits, self.dtype, prompt=True) for logits in heads]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop_ids: Collection[int] = (),
        exact_tokens: bool = False,
        cache: KVCache | None = None,
        on_token: OnToken | None = None,
    ) -> Generated:
        """Answer each prompt.

        Args:
            prompts: ids of each row; with a cache, what follows there.
            max_new_tokens: at most so many per row.
            sampling: how tokens are chosen.
            stop_ids: each ends its row, and is not part of the answer.
            exact_tokens: give every row exactly ``max_new_tokens``: stop ids are suppressed, their logits
                −∞, as ``min_new_tokens`` does in transformers.
            cache: goes on from there; None: an empty one, of the size that is needed.
            on_token: called with (row, id) as tokens come.

        Raises:
            UsageError: as `prefill`, no token was asked for, or every id is suppressed.
        """
        _require_some(max_new_tokens)
        if not prompts:
            return Generated([])
        if cache is None:
            cache = self.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
        stops = frozenset(stop_ids)
        never = stops if exact_tokens else frozenset[int]()
        ids: list[list[int]] = [[] for _ in prompts]
        ends: list[int | None] = [None] * len(prompts)
        timing = Timing()
        for drawn in self._steps(prompts, max_new_tokens, sampling, cache, timing, never):
            for row, token in enumerate(drawn):
                if ends[row] is not None:
                    continue
                if token in stops:
                    ends[row] = token
                    continue
                ids[row].append(token)
                if on_token is not None:
                    on_token(row, token)
            if None not in ends:
                break
        return Generated([Answer(row, end) for row, end in zip(ids, ends, strict=True)], timing)

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int],
        cache: KVCache,
        timing: Timing,
    ) -> Iterator[int]:
        """Yield the tokens of one answer as they come, up to a stop id (left out) or the limit."""
        stops = frozenset(stop_ids)
        for (token,) in self._steps([prompt], max_new_tokens, sampling, cache, timing):
            if token in stops:
                return
            yield token

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        cache: KVCache,
        timing: Timing,
        suppressed: Collection[int] = (),
    ) -> Iterator[list[int]]:
        """Yield the next token of every row, at most ``max_new_tokens`` times; none of ``suppressed``.

        Between two steps the cache holds all tokens but the newest: a caller that stops early can go on.
        """
        _require_some(max_new_tokens)
        sampler = Sampler(sampling, len(prompts), self.real_vocab, suppressed)
        longest = max(old + len(new) for old, new in zip(cache.lengths, prompts, strict=True))
        if longest + max_new_tokens - 1 > cache.capacity:
            raise UsageError(
                f"a prompt of {longest} and {max_new_tokens} new tokens do not fit into a cache of "
                f"{cache.capacity}",
                hint="shorten the prompt or ask for fewer new tokens",
            )
        with stopwatch(self.device) as watch:
            tokens = sampler(self.prefill(prompts, cache))
            drawn = tokens.tolist()
        timing.prefill_tokens += sum(map(len, prompts))
        timing.prefill_seconds += watch.seconds
        yield drawn
        for _ in range(max_new_tokens - 1):
            with stopwatch(self.device) as watch:
                tokens = sampler(self.decode(tokens, cache))
                drawn = tokens.tolist()
            timing.decode_tokens += len(drawn)
            timing.decode_seconds += watch.seconds
            yield drawn

    def _prompt_hidden(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        counts = [len(prompt) for prompt in prompts]
        padded = [[*prompt, *[0] * (max(counts) - len(prompt))] for prompt in prompts]
        return self.forward(torch.tensor(padded, device=self.device), counts, cache)

    def _memory(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
        what = f"{len(prompts)} prompts of up to {max(map(len, prompts), default=0)} tokens"
        return explained(self.device, what, "run fewer prompts at once (in eval --batch), or shorter ones")

    def _step_memory(self, cache: KVCache) -> AbstractContextManager[None]:
        what = f"a decode step of {cache.batch} rows of up to {cache.capacity} tokens"
        return explained(self.device, what, LOWER)

    def _check(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> None:
        self._check_cache(cache)
        if not prompts:
            raise UsageError("there is no prompt to run")
        if len(prompts) != cache.batch:
            raise UsageError(f"{len(prompts)} prompts do not fit a cache of {cache.batch} rows")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise UsageError("an empty prompt: there is nothing to go on from", where=f"prompt {row}")
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise UsageError(
                    f"ids run from {min(prompt)} to {max(prompt)}, the model knows 0 … {self.vocab_size - 1}",
                    where=f"prompt {row}",
                    hint="the tokenizer belongs to another model",
                )

    def _check_step(self, tokens: Tensor, cache: KVCache) -> None:
        self._check_cache(cache)
        if tokens.shape != (cache.batch,) or not cache.batch:
            raise UsageError(
                f"tokens of shape {list(tokens.shape)} are not one for each of {cache.batch} rows"
            )
        # A GPU would have to be waited for; there they come from the sampler, which draws no others.
        if tokens.device.type == "cpu":
            least, most = (int(end) for end in tokens.aminmax())
            if not 0 <= least <= most < self.vocab_size:
                raise UsageError(f"ids run from {least} to {most}, the model knows 0 … {self.vocab_size - 1}")

    def _check_cache(self, cache: KVCache) -> None:
        if self._form is None:
            self._form = self.new_cache(1, 1).form
        if cache.form != self._form:
            raise UsageError(
                f"a cache of {cache.form} (layers, key/value heads, their width, dtype) is of another model, "
                f"this one has {self._form}",
                hint="make it with new_cache of the same engine",
            )


def _require_some(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens are none", where="--max-new-tokens")
