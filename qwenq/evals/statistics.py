"""Estimate figures of tokens in sequences.

Tokens of one sequence share its topic, so they are not independent draws; sequences are the unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; the bounds are None where one sequence alone cannot give any."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return plain numbers; None where a number is not finite, which JSON cannot hold."""
        return {name: json_number(value) for name, value in vars(self).items()}


def json_number(value: float | None) -> float | None:
    """Return the number, or None for NaN, infinity and None."""
    return float(value) if value is not None and math.isfinite(value) else None


def mean_of_sequences(values: NDArray[np.float64]) -> Estimate:
    """Return the mean of [sequences, tokens] with Student's t interval over the sequences' means.

    The interval is exact for normal means at any n; a bootstrap of a few sequences is too narrow.
    """
    from scipy.special import stdtrit  # here, as `qwenq compare` needs no scipy

    with np.errstate(invalid="ignore", over="ignore"):
        means = values.mean(axis=1)  # [sequences]
        mean, count = float(means.mean()), len(means)
        if count < 2:
            return Estimate(mean, None, None)
        quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
        half = quantile * float(means.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Stretch:
    """Mean over a range of positions of every sequence.

    Attributes:
        first, last: numbers of tokens before the first and the last prediction.
        mean: with its interval over sequences.
        n: predictions.
    """

    first: int
    last: int
    mean: Estimate
    n: int

    def to_json(self) -> dict[str, float | None]:
        """Return plain numbers."""
        return {"first": self.first, "last": self.last, "n": self.n, **self.mean.to_json()}


STRETCHES = 16


def by_position(values: NDArray[np.float64], count: int = STRETCHES) -> tuple[Stretch, ...]:
    """Return means over ranges of equal length along the tokens.

    Args:
        values: [sequences, tokens] of a figure that is never below zero; nor are the intervals' bounds.
        count: ranges, at most.
    """
    sequences, tokens = values.shape
    edges = [round(n * tokens / min(count, tokens)) for n in range(min(count, tokens) + 1)]
    made = []
    for start, end in pairwise(edges):
        mean = mean_of_sequences(values[:, start:end])
        mean = mean if mean.low is None else replace(mean, low=max(0.0, mean.low))
        made.append(Stretch(start + 1, end, mean, sequences * (end - start)))
    return tuple(made)


def ratio_of_perplexities(nll: NDArray[np.float64], base_nll: NDArray[np.float64]) -> Estimate:
    """Return exp(mean(nll − base_nll)) of [sequences, tokens] in nats, paired by token."""
    log_ratio = mean_of_sequences(nll - base_nll)
    bounds = (None if x is None else _exp(x) for x in (log_ratio.low, log_ratio.high))
    return Estimate(_exp(log_ratio.value), *bounds)


def perplexity(nll: NDArray[np.float64]) -> float:
    """Return exp of the mean of nats."""
    return _exp(float(nll.mean()))


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def rate_of_sequences(hits: NDArray[np.bool_]) -> Estimate:
    """Return the share of hits in [sequences, tokens] with Wilson's interval.

    The number of tokens is divided by the design effect (Kish 1965).
    """
    rate = float(hits.mean())
    low, high = wilson(rate, hits.size / design_effect(hits))
    return Estimate(rate, low, high)


def design_effect(hits: NDArray[np.bool_]) -> float:
    """Return the variance of the sequences' rates over that of independent tokens; at least 1."""
    sequences, tokens = hits.shape
    rate = float(hits.mean())
    independent: float = rate * (1 - rate) / tokens
    if sequences < 2 or independent == 0:
        return 1.0
    return max(1.0, float(hits.mean(axis=1).var(ddof=1)) / independent)


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share ``rate`` of ``count`` draws."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    # at 0 and 1 the bound is the rate itself, but for rounding
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))
