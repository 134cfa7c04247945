"""Decode speed over position, without waiting for a generation to get there.

How long a step takes depends on how much is in the cache, not on what. So the cache is said to be filled up
to a position, a few steps are timed there, and so on along the whole length; a round visits every position
once.
The speed of the whole length follows from the seconds per token between them, by trapezoids.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenq.profiling.bandwidth import cache_bytes, synchronise
from qwenq.profiling.positions import POSITIONS, steps_at_once
from qwenq.profiling.statistics import enough, summarise

if TYPE_CHECKING:
    from qwenq.profiling.measure import Bench
    from qwenq.results import Row

_HOW = "greedy; the cache is said to be filled, its keys and values are zeros"


@dataclass(frozen=True)
class Decoding:
    """Seconds per token at each position, a list a round.

    Attributes:
        positions: tokens in the cache before each timed run of steps.
        rounds: seconds per token, [rounds][positions].
        steps: timed at each position.
        cache_bytes: of the whole cache.
    """

    positions: tuple[int, ...]
    rounds: tuple[tuple[float, ...], ...]
    steps: int
    cache_bytes: int

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of the whole length, of each round."""
        return [1 / _mean(self.positions, each) for each in self.rounds]

    @property
    def mean(self) -> float:
        """Tokens per second of the last round."""
        return self.speeds[-1]

    @property
    def curve(self) -> list[float]:
        """Tokens per second at each position, median of the rounds."""
        return [1 / statistics.median(column) for column in zip(*self.rounds, strict=True)]

    @property
    def first_step(self) -> tuple[int, float]:
        """The first position, and the median seconds of a step there."""
        return self.positions[0], 1 / self.curve[0]

    def row(self, bench: Bench) -> Row:
        """``speed.decode``, with its curve."""
        curve = {"positions": list(self.positions), "values": self.curve}
        settings = {"decode": _HOW, "warm_up": "one round", "steps": self.steps}
        return bench.summary("speed.decode", summarise(self.speeds), details=curve, settings=settings)


def decode_speed(bench: Bench, *, rounds: int, patience: float = 0.0) -> Decoding:
    """Time rounds until their interval is narrow, at most so many; 0: the warm-up alone, for estimates."""
    point, engine = bench.point, bench.engine
    cache = engine.new_cache(1, point.context + point.tokens)
    tokens = torch.tensor(bench.prompt[:1], device=engine.device)

    def run(position: int, steps: int) -> float:
        nonlocal tokens
        cache.lengths = [position]
        synchronise(engine.device)
        start = time.perf_counter()
        for _ in range(steps):
            tokens = engine.decode(tokens, cache).argmax(-1)
        synchronise(engine.device)
        return (time.perf_counter() - start) / steps

    run(point.context, 1)  # compiles, where anything has to be
    steps = steps_at_once(point.tokens, run(point.context, 1))
    positions = spread(point.context, point.context + point.tokens - steps)
    warm = tuple(run(position, steps) for position in positions)
    if rounds == 0:
        bench.cache_bytes = cache_bytes(cache)
        return Decoding(positions, (warm,), steps, bench.cache_bytes)
    made: list[tuple[float, ...]] = []
    began = time.monotonic()
    while True:
        made.append(tuple(run(position, steps) for position in positions))
        found = Decoding(positions, tuple(made), steps, cache_bytes(cache))
        taken = time.monotonic() - began
        if len(made) >= rounds or enough(found.speeds, taken, patience):
            return found


def spread(first: int, last: int, count: int = POSITIONS) -> tuple[int, ...]:
    """Positions from first to last, evenly; fewer where there are fewer."""
    count = max(1, min(count, last - first + 1))
    if count == 1:
        return (first,)
    return tuple(first + round(n * (last - first) / (count - 1)) for n in range(count))


def _mean(positions: tuple[int, ...], seconds: tuple[float, ...]) -> float:
    """Mean seconds per token between the first and the last position."""
    if len(positions) == 1:
        return seconds[0]
    steps = zip(positions, positions[1:], seconds, seconds[1:], strict=False)
    area = sum((right - left) * (a + b) / 2 for left, right, a, b in steps)
    return area / (positions[-1] - positions[0])
