"""Token by token: the loop that all engines share, and what it measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qwenq.errors import UsageError
from qwenq.runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from qwenq.runtime.cache import KVCache
    from qwenq.runtime.engine import Engine

OnToken = Callable[[int, int], None]
"""Called with (row, id) for every token that is kept, as soon as it is known."""


@dataclass
class Timing:
    """Tokens and wall seconds, prefill and decode apart. The first new token belongs to the prefill.

    Attributes:
        prefill_tokens: prompt tokens that were computed (not those found in a cache).
        decode_tokens: tokens from decode steps, all rows.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def add(self, other: Timing) -> None:
        """Add another measurement to this one."""
        self.prefill_tokens += other.prefill_tokens
        self.prefill_seconds += other.prefill_seconds
        self.decode_tokens += other.decode_tokens
        self.decode_seconds += other.decode_seconds


@dataclass(frozen=True)
class Answer:
    """What one row of a batch became.

    Attributes:
        ids: new tokens, without the stop id that ended them.
        stop_id: that id; None when the token limit came first.
    """

    ids: list[int]
    stop_id: int | None


@dataclass(frozen=True)
class Generated:
    """The answers in the order of the prompts, and how long they took."""

    answers: list[Answer]
    timing: Timing = field(default_factory=Timing)


def steps(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    cache: KVCache,
    timing: Timing,
    suppressed: Collection[int] = (),
) -> Iterator[list[int]]:
    """The next token of every row, again and again, at most ``max_new_tokens`` times; none of ``suppressed``.

    Between two steps the cache holds all tokens but the newest; whoever stops early can go on from there.

    Raises:
        UsageError: no token was asked for, the prompts with all new tokens would not fit into the cache, or
            every id is suppressed.
    """
    _require_some(max_new_tokens)
    sampler = Sampler(sampling, len(prompts), engine.real_vocab, suppressed)
    longest = max(old + len(new) for old, new in zip(cache.lengths, prompts, strict=True))
    if longest + max_new_tokens - 1 > cache.capacity:
        raise UsageError(
            f"a prompt of {longest} and {max_new_tokens} new tokens do not fit into a cache of "
            f"{cache.capacity}",
            hint="shorten the prompt or ask for fewer new tokens",
        )
    with _stopwatch(engine.device) as watch:
        tokens = sampler(engine.prefill(prompts, cache))
        drawn = tokens.tolist()
    timing.add(Timing(prefill_tokens=sum(map(len, prompts)), prefill_seconds=watch.seconds))
    yield drawn
    for _ in range(max_new_tokens - 1):
        with _stopwatch(engine.device) as watch:
            tokens = sampler(engine.decode(tokens, cache))
            drawn = tokens.tolist()
        timing.add(Timing(decode_tokens=len(drawn), decode_seconds=watch.seconds))
        yield drawn


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    exact_tokens: bool,
    cache: KVCache | None,
    on_token: OnToken | None,
) -> Generated:
    """Answer a batch of prompts; see `Engine.generate`."""
    _require_some(max_new_tokens)
    if not prompts:
        return Generated([])
    if cache is None:
        cache = engine.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    stops = frozenset(stop_ids)
    never = stops if exact_tokens else frozenset[int]()
    ids: list[list[int]] = [[] for _ in prompts]
    ends: list[int | None] = [None] * len(prompts)
    timing = Timing()
    for drawn in steps(engine, prompts, max_new_tokens, sampling, cache, timing, never):
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
    engine: Engine,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    cache: KVCache,
    timing: Timing,
) -> Iterator[int]:
    """The tokens of one answer as they come, up to a stop id (not given out) or the limit."""
    stops = frozenset(stop_ids)
    for (token,) in steps(engine, [prompt], max_new_tokens, sampling, cache, timing):
        if token in stops:
            return
        yield token


def _require_some(max_new_tokens: int) -> None:
    """An answer has at least one token.

    Raises:
        UsageError: none was asked for.
    """
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens are none", where="--max-new-tokens")


class _stopwatch:  # noqa: N801 - reads as a statement
    """Wall seconds of a block; work that a GPU was given is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, 0.0

    def __enter__(self) -> _stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds = time.perf_counter() - self._start


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [rows, longest], shorter rows filled with 0 on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
