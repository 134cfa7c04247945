"""Estimate the median of repeated measurements.

From six values on its interval lies between two order statistics (distribution-free, by the binomial with
p = 1/2; Conover, Practical Nonparametric Statistics, 3.2). Fewer values cannot give 95 % that way: then it is
Student's t interval of the logarithms, which is wide, as it should be. A single value has no interval.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ORDER, STUDENT = "order statistics", "Student's t of the logarithms"
_T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t with n - 1 degrees of freedom, by n."""
NARROW = 0.01
"""Relative half-width of an interval that needs no more repetitions."""
LEAST, MOST = 6, 30
"""Repetitions: from LEAST on the interval needs no assumption; none after MOST."""
_FENCE = 3.0
"""Scaled median absolute deviations from the median beyond which a value is an outlier."""


@dataclass(frozen=True)
class Summary:
    """A median of repeated measurements.

    Attributes:
        low, high: 95 % interval of the median; None for a single value.
        method: how the interval was made.
        outliers: (index, value), in the order measured; named, not removed.
    """

    median: float
    low: float | None
    high: float | None
    n: int
    method: str | None
    outliers: tuple[tuple[int, float], ...]

    @property
    def spread(self) -> float:
        """Return half the interval, relative to the median; infinite where there is no interval."""
        if self.low is None or self.high is None:
            return math.inf
        return (self.high - self.low) / 2 / abs(self.median)

    def details(self) -> dict[str, Any]:
        """Return the method and the outliers, for ``Row.details``."""
        found: dict[str, Any] = {"interval": self.method} if self.method else {}
        if self.outliers:
            found["outliers"] = [{"repetition": i, "value": value} for i, value in self.outliers]
        return found


def summarise(values: Sequence[float]) -> Summary:
    """Return the median of positive values with its interval.

    Raises:
        ValueError: no value, or one that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError("a median needs at least one value, and all of them positive")
    middle, n = statistics.median(values), len(values)
    low, high, method = _interval(sorted(values), middle)
    return Summary(middle, low, high, n, method, _outliers(values, middle))


def _interval(ordered: list[float], middle: float) -> tuple[float | None, float | None, str | None]:
    n = len(ordered)
    if n == 1:
        return None, None, None
    if n in _T975:
        logs = [math.log(value) for value in ordered]
        half = _T975[n] * statistics.stdev(logs) / math.sqrt(n)
        mean = statistics.fmean(logs)
        return min(middle, math.exp(mean - half)), max(middle, math.exp(mean + half)), STUDENT
    below = rank(n)
    return ordered[below - 1], ordered[n - below], ORDER


def rank(n: int) -> int:
    """Return the largest r with P(r-th smallest ≤ median ≤ r-th largest) ≥ 0.95 of n ≥ 6 values, from 1."""
    tail, r = 0.0, 0
    while True:
        tail += math.comb(n, r) * 0.5**n  # P(at most r values lie below the median)
        if tail > 0.025:
            return r
        r += 1


def _outliers(values: Sequence[float], middle: float) -> tuple[tuple[int, float], ...]:
    """Return values beyond three deviations (1.4826 times the median absolute one, as for a normal)."""
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    if deviation == 0:
        return ()
    return tuple((i, v) for i, v in enumerate(values) if abs(v - middle) > _FENCE * deviation)


def repeat(once: Callable[[], float], patience: float) -> list[float]:
    """Call ``once`` until its interval is narrow or ``patience`` seconds are over; at least once."""
    values: list[float] = []
    began = time.monotonic()
    while True:
        values.append(once())
        if len(values) >= MOST or enough(values, time.monotonic() - began, patience):
            return values


def enough(values: Sequence[float], taken: float, patience: float) -> bool:
    """Tell whether the interval is narrow, or another repetition would exceed ``patience`` seconds."""
    if taken + taken / len(values) > patience:
        return True
    return len(values) >= LEAST and summarise(values).spread <= NARROW
