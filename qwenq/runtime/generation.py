"""Generate token by token: the protocol of all engines, their loop, and what it measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

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
    """The answer of one row of a batch.

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


class stopwatch:  # noqa: N801 - reads as a statement
    """Wall seconds of a block; work that a GPU was given is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, 0.0

    def __enter__(self) -> stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds = time.perf_counter() - self._start
