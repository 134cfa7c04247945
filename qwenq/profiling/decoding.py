"""Time decode steps at positions along a generation, with a cache that is marked as filled up to there.

How long a step takes depends on how much is in the cache, not on what. A round visits every position once;
the speed of the whole generation follows from the seconds per token between them, by trapezoids.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qwenq.profiling.bandwidth import cache_bytes, synchronise
from qwenq.profiling.planning import POSITIONS, steps_at_once
from qwenq.profiling.statistics import enough, summarise

if TYPE_CHECKING:
    from qwenq.profiling.measure import Bench
    from qwenq.results import Row


@dataclass(frozen=True)
class Decoding:
    """Seconds per token at each position.

    Attributes:
        positions: tokens in the cache before each timed run of steps.
        rounds: seconds per token, [rounds][positions].
        steps: timed at each position.
    """

    positions: tuple[int, ...]
    rounds: tuple[tuple[float, ...], ...]
    steps: int

    @property
    def speeds(self) -> list[float]:
        """Return the tokens per second of the whole generation, by each round."""
        return [1 / _mean(self.positions, each) for each in self.rounds]

    @property
    def curve(self) -> list[float]:
        """Return the tokens per second at each position, median of the rounds."""
        return [1 / statistics.median(column) for column in zip(*self.rounds, strict=True)]

    def row(self, bench: Bench) -> Row:
        """Return ``speed.decode``, with its curve."""
        how = "greedy; the cache is marked as filled, its keys and values are zeros"
        curve = {"positions": list(self.positions), "values": self.curve}
        settings = {"decode": how, "warm_up": "one round", "steps": self.steps}
        return bench.summary("speed.decode", summarise(self.speeds), details=curve, settings=settings)


def decode_speed(bench: Bench, *, rounds: int, patience: float = 0.0) -> Decoding:
    """Time at most that many rounds, until their interval is narrow; 0: the warm-up alone, for estimates."""
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
    bench.cache_bytes = cache_bytes(cache)
    if rounds == 0:
        return Decoding(positions, (warm,), steps)
    made: list[tuple[float, ...]] = []
    began = time.monotonic()
    while True:
        made.append(tuple(run(position, steps) for position in positions))
        found = Decoding(positions, tuple(made), steps)
        if len(made) >= rounds or enough(found.speeds, time.monotonic() - began, patience):
            return found


def spread(first: int, last: int, count: int = POSITIONS) -> tuple[int, ...]:
    """Return positions from first to last, evenly spread; fewer where there are fewer."""
    count = max(1, min(count, last - first + 1))
    if count == 1:
        return (first,)
    return tuple(first + round(n * (last - first) / (count - 1)) for n in range(count))


def _mean(positions: tuple[int, ...], seconds: tuple[float, ...]) -> float:
    """Return the mean seconds per token between the first and the last position."""
    if len(positions) == 1:
        return seconds[0]
    steps = zip(positions, positions[1:], seconds, seconds[1:], strict=False)
    area = sum((right - left) * (a + b) / 2 for left, right, a, b in steps)
    return area / (positions[-1] - positions[0])
