"""Axes: from figures to places on the drawing, with round numbers for ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers on a stretch of the drawing; ``log`` needs ``low`` above zero.

    Attributes:
        low, high: figures at the two ends.
        start, end: places of these ends, in units of the drawing.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a figure is."""
        if self.log:
            low = math.log(self.low)  # a difference of logarithms: the ratio could overflow
            share = (math.log(value) - low) / (math.log(self.high) - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers within, about ``count``; if logarithmic, powers of ten, for few also 2 and 5."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            digits = (1, 2, 5) if last - first <= 3 else (1,)
            powers = range(first, last + 1, max(1, (last - first) // 8))
            found = [digit * 10.0**power for power in powers for digit in digits]
        else:
            step = round_step(self.high - self.low, count)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            found = [number * step for number in range(first, last + 1)]
        air = 0.0 if self.log else 1e-9 * (self.high - self.low)
        return [tick for tick in found if self.low - air <= tick <= self.high + air]


def round_step(width: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, so that about ``count`` steps fit into ``width``."""
    raw = width / max(count, 1)
    power: float = 10.0 ** math.floor(math.log10(raw))
    return power * next(digit for digit in (1, 2, 5, 10) if digit * power >= raw * (1 - 1e-9))


def bounds(values: Iterable[float], *, zero: bool, log: bool = False) -> tuple[float, float]:
    """A stretch with a little air that holds all values, and zero if wanted; never empty."""
    listed = list(values)
    low, high = min(listed), max(listed)
    if log:
        return low / 1.3, high * 1.3
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    largest = max(abs(low), abs(high))
    air = (high - low) * 0.06 if high - low > 1e-6 * largest else largest * 0.1
    air = air if air > 1e-12 else 1.0
    if not zero:
        return low - air, high + air
    return (low - air if low < 0 else low), (high + air if high > 0 or low == 0 else high)


def tick_text(value: float) -> str:
    """``8192``, ``0.05``, ``1.5e-06``: as short as it can be."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.6g}"
