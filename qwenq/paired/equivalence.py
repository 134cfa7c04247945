"""Bound a change of accuracy, and test for equivalence.

The interval and the tests are Tango's score test for the difference of two paired shares (Statistics in
Medicine 17, 1998, 891-908): it compares the difference with any value, not with zero alone, and holds where
few items or none differ, where an interval of ± 1.96 standard errors would have no width.

Equivalence is two one-sided tests (TOST; Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 1987):
that the drop is below the margin, and that the gain is, each at 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

MARGIN = 0.02
"""Drop of accuracy, as a share of all items, from which a loss matters here."""
_STEPS = 60  # bisection: far below any digit that is shown


def statistic(lost: int, won: int, n: int, change: float) -> float:
    """Return how many standard errors the measured change is above a hypothetical one.

    Args:
        lost, won: items that only the base, and only the model, got right.
        n: all items.
        change: the hypothesis, a share between -1 and 1, negative for a drop.
    """
    drop = -change
    # The share of items won that is likeliest where the shares lost and won differ by exactly this drop.
    b = -lost - won + (2 * n - lost + won) * drop
    c = -won * drop * (1 - drop)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + drop * (1 - drop))
    above = won - lost - n * change
    if variance <= 1e-12 * n:
        return 0.0 if abs(above) < 1e-9 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


def change_interval(lost: int, won: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of the change."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    measured = (won - lost) / n
    low = _crossing(lambda change: statistic(lost, won, n, change) > z, -1.0, measured)
    high = _crossing(lambda change: statistic(lost, won, n, change) >= -z, measured, 1.0)
    return low, high


def equivalence_p(lost: int, won: int, n: int, margin: float = MARGIN) -> float:
    """Return the p value of TOST: below 0.05, both a drop and a gain of the margin are excluded."""
    above = statistic(lost, won, n, -margin)
    below = statistic(lost, won, n, margin)
    return max(NormalDist().cdf(-above), NormalDist().cdf(below))


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds at ``low`` ends on the way to ``high``."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return (low + high) / 2
