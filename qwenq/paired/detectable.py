"""Compute the power of McNemar's test, and the smallest drop that a sample can show."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qwenq.paired.mcnemar import ALPHA

POWER = 0.8
_TAIL = 8.0  # standard deviations of the number of disagreements that are summed over
_POWER_STEPS = 40  # bisection: far below any digit that is shown


def detectable_drop(n: int, discordant: float) -> float | None:
    """Return the smallest drop in accuracy that McNemar's test (p < 0.05) finds with probability 0.8.

    Args:
        n: items.
        discordant: share of items on which the models disagree. Where it is smaller than the drop, every
            disagreement counts as a loss.
    """
    if power(n, discordant, 1.0) < POWER:
        return None
    low, high = 0.0, 1.0
    for _ in range(_POWER_STEPS):
        middle = (low + high) / 2
        if power(n, discordant, middle) < POWER:
            low = middle
        else:
            high = middle
    return high


def power(n: int, discordant: float, drop: float) -> float:
    """Return the probability that the test finds a drop of this size (p < 0.05, more lost than won).

    It is exact: a sum over the number of disagreements among n items, and of losses among these.
    """
    from scipy.special import bdtr  # here, as `qwenq compare` needs no scipy

    share = max(discordant, drop)
    if share == 0:
        return 0.0
    spread = _TAIL * math.sqrt(n * share * (1 - share)) + 1
    first, last = max(1, math.floor(n * share - spread)), min(n, math.ceil(n * share + spread))
    counts = np.arange(first, last + 1)  # items on which they disagree
    most = _most_wins(counts)
    found = np.where(most >= 0, bdtr(np.maximum(most, 0), counts, (share - drop) / (2 * share)), 0.0)
    return float((_binomial(counts, n, share) * found).sum())


def _most_wins(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the most wins among so many disagreements with which a loss is significant; -1 without any."""
    from scipy.special import bdtr, bdtrik

    most = np.floor(bdtrik(ALPHA / 2, counts, 0.5))
    most = np.where(np.isfinite(most), most, -1.0) + 1  # one too many at most, whatever was rounded
    for _ in range(3):
        significant = 2 * bdtr(np.maximum(most, 0), counts, 0.5) < ALPHA
        most = np.where((most >= 0) & ~significant, most - 1, most)
    return np.asarray(most)


def _binomial(counts: NDArray[np.int64], n: int, share: float) -> NDArray[np.float64]:
    """Return the probability of each count among n."""
    from scipy.special import gammaln

    if share >= 1:
        return np.asarray(counts == n, dtype=np.float64)
    logs = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    found: NDArray[np.float64] = np.exp(logs + counts * math.log(share) + (n - counts) * math.log1p(-share))
    return found
