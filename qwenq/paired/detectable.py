"""The smallest drop that a sample could have shown.

It is the drop in accuracy that McNemar's test (p < 0.05) would find with probability 0.8, were the models to
disagree on as large a share of items as they do here; if that share is smaller than the drop itself, every
disagreement is a loss. The power is the exact one: a sum over how many of the n items they disagree on, and
how many of these are losses.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrik, gammaln

from qwenq.paired.mcnemar import ALPHA

POWER = 0.8
_TAIL = 8.0  # standard deviations of the number of disagreements that are summed over
_STEPS = 40  # bisection: far below any digit that is shown


def detectable_drop(n: int, discordant: float) -> float | None:
    """The smallest detectable drop with n items of which a share ``discordant`` differs; see above."""
    if power(n, discordant, 1.0) < POWER:
        return None
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if power(n, discordant, middle) < POWER:
            low = middle
        else:
            high = middle
    return high


def power(n: int, discordant: float, drop: float) -> float:
    """Probability that the test finds a drop (p < 0.05, more lost than won) when there is one."""
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
    """Of so many disagreements, the most wins with which a loss is still significant; -1: none."""
    most = np.floor(bdtrik(ALPHA / 2, counts, 0.5))
    most = np.where(np.isfinite(most), most, -1.0) + 1  # one too many at most, whatever was rounded
    for _ in range(3):
        significant = 2 * bdtr(np.maximum(most, 0), counts, 0.5) < ALPHA
        most = np.where((most >= 0) & ~significant, most - 1, most)
    return np.asarray(most)


def _binomial(counts: NDArray[np.int64], n: int, share: float) -> NDArray[np.float64]:
    """Probability of each count among n."""
    if share >= 1:
        return np.asarray(counts == n, dtype=np.float64)
    logs = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    found: NDArray[np.float64] = np.exp(logs + counts * math.log(share) + (n - counts) * math.log1p(-share))
    return found
