"""A model beside its base on the same items: what was lost, what was won, and what this sample could show.

Only items that one of the two got right and the other wrong tell them apart (McNemar 1947). If nothing was
lost, each of these is as likely a loss as a win: the p-value is the binomial's, exact and two-sided.

**The smallest detectable drop** is the drop in accuracy that this very test (p < 0.05) would find with
probability 0.8, were the models to disagree on as large a share of items as they do here; if that share is
smaller than the drop itself, every disagreement is a loss. The power is the exact one: a sum over how many
of the n items they disagree on, and how many of these are losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrik, gammaln

ALPHA = 0.05
POWER = 0.8
_TAIL = 8.0  # standard deviations of the number of disagreements that are summed over
_STEPS = 40  # bisection: far below any digit that is shown


@dataclass(frozen=True)
class Paired:
    """Two models on the same items.

    Attributes:
        n: items that both answered.
        lost: the base had them right, the model wrong.
        won: the other way round.
        p: exact two-sided McNemar.
        detectable: smallest detectable drop as a share, see above; None where no drop at all would be found.
    """

    n: int
    lost: int
    won: int
    p: float
    detectable: float | None

    @property
    def change(self) -> float:
        """Accuracy of the model less that of its base."""
        return (self.won - self.lost) / self.n

    @property
    def sentence(self) -> str:
        """What can be said, in words."""
        points = f"{100 * abs(self.change):.1f} points"
        if self.p < ALPHA:
            return f"{'lost' if self.change < 0 else 'gained'} {points} (p {readable_p(self.p)})"
        if self.detectable is None:
            return f"too few items: with {self.n}, no loss at all could be shown"
        return f"no loss detectable above {100 * self.detectable:.1f} points"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "change": self.change, "sentence": self.sentence}


def compare(base: Mapping[str, bool], model: Mapping[str, bool]) -> Paired | None:
    """Pair two models' verdicts by item id; None where they have no item in common."""
    common = base.keys() & model.keys()
    if not common:
        return None
    lost = sum(base[item] and not model[item] for item in common)
    won = sum(model[item] and not base[item] for item in common)
    drop = detectable_drop(len(common), (lost + won) / len(common))
    return Paired(len(common), lost, won, mcnemar(lost, won), drop)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value: twice the binomial's smaller tail, at most 1."""
    if lost + won == 0:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5)))


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


def readable_p(p: float) -> str:
    """A p-value for people, with its sign: ``= 0.012`` or ``< 0.001``."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


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
