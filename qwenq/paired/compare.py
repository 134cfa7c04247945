"""A model beside its base on the same items: what was lost, what was won, and what this sample could show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from qwenq.paired.mcnemar import ALPHA, mcnemar, said_p


@dataclass(frozen=True)
class Paired:
    """Two models on the same items.

    Attributes:
        n: items.
        lost: the base got them right, the model wrong.
        won: the other way round.
    """

    n: int
    lost: int
    won: int

    @cached_property
    def p(self) -> float:
        """Exact two-sided McNemar, not corrected."""
        return mcnemar(self.lost, self.won)

    @cached_property
    def detectable(self) -> float | None:
        """Smallest detectable drop as a share; None: no drop at all would be found."""
        from qwenq.paired.detectable import detectable_drop  # scipy, which `qwenq compare` needs not wait for

        return detectable_drop(self.n, (self.lost + self.won) / self.n)

    def said_of(self, change: float) -> str:
        """What can be said of a change of the score, in words.

        Args:
            change: score of the model less that of its base. Averaged over subjects it may go the other way
                than the items, which are what is tested; then it is these that are counted.
        """
        if self.p < ALPHA:
            points = f"{100 * abs(change):.1f}"
            if points == "0.0" or (change < 0) != (self.lost > self.won):
                return f"lost {self.lost:,}, won {self.won:,} items ({said_p(self.p)})"
            return f"{'lost' if change < 0 else 'gained'} {points} points ({said_p(self.p)})"
        if self.detectable is None:
            return f"too few items: with {self.n}, no loss at all could be shown"
        return f"no loss detectable above {100 * self.detectable:.1f} points"

    def to_json(self, change: float) -> dict[str, Any]:
        """Plain values; ``change`` as in `said_of`."""
        figures = {"p": self.p, "detectable": self.detectable, "change": change}
        return {**asdict(self), **figures, "sentence": self.said_of(change)}


def compare(
    base: Mapping[str, bool], model: Mapping[str, bool], *, questions: tuple[object, object] = (None, None)
) -> Paired | str:
    """Pair two models' verdicts by item id; or why they cannot be paired.

    Args:
        base, model: whether each item was answered correctly.
        questions: a hash of all that each was asked, where it is known: ids alone are places in a file.
    """
    if base.keys() != model.keys() or not base:
        apart, all_ = base.keys() ^ model.keys(), base.keys() | model.keys()
        return f"other items: {len(apart)} of {len(all_)} are in one of the two only"
    if None not in questions and questions[0] != questions[1]:
        return "other questions under the same ids: the data has changed"
    lost = sum(base[item] and not model[item] for item in base)
    won = sum(model[item] and not base[item] for item in base)
    return Paired(len(base), lost, won)
