"""Compare a model with its base on the same items, and summarise all comparisons in one headline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from qwenq.paired.detectable import detectable_drop
from qwenq.paired.equivalence import MARGIN, change_interval, equivalence_p
from qwenq.paired.mcnemar import ALPHA, mcnemar, said_p


@dataclass(frozen=True)
class Paired:
    """Verdicts of two models on the same items.

    Attributes:
        n: items.
        lost: items that the base answered correctly and the model did not.
        won: items that the model answered correctly and the base did not.
    """

    n: int
    lost: int
    won: int

    @cached_property
    def p(self) -> float:
        """Return the p value of McNemar's exact two-sided test, uncorrected."""
        return mcnemar(self.lost, self.won)

    @cached_property
    def detectable(self) -> float | None:
        """Return the smallest detectable drop as a share; None where no drop at all would be found."""
        return detectable_drop(self.n, (self.lost + self.won) / self.n)

    @property
    def change(self) -> float:
        """Return the change of the share of items that are right, all items alike."""
        return (self.won - self.lost) / self.n

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of ``change``."""
        return change_interval(self.lost, self.won, self.n)

    @cached_property
    def equivalence_p(self) -> float:
        """Return the p value of TOST: whether a change as large as the margin is excluded."""
        return equivalence_p(self.lost, self.won, self.n)

    @property
    def equivalent(self) -> bool:
        """Return whether a change as large as the margin is excluded."""
        return self.equivalence_p < ALPHA

    def said_change(self, change: float) -> str:
        """Return a change of the score with the interval of what the items show.

        Args:
            change: of the score. An average over subjects may change otherwise than the share of items, which
                is what the test is about; then both are given.
        """
        low, high = (points(bound, signed=True) for bound in self.interval)
        interval = f"95 % interval {low} to {high}"
        score, items = points(change, signed=True), points(self.change, signed=True)
        if score == items:
            return f"{score} points, {interval}"
        return f"{score} points; all items alike {items}, {interval}"

    def said_of(self, change: float) -> str:
        """Return the verdict on a change of the score: loss, gain, no loss beyond a margin, inconclusive.

        Args:
            change: as in `said_change`.
        """
        shown = self.said_change(change)
        if self.p < ALPHA:
            return f"{'loss' if self.lost > self.won else 'gain'}: {shown} ({said_p(self.p)})"
        if self.equivalent:
            return f"no loss beyond {points(MARGIN)} points: {shown} (TOST, {said_p(self.equivalence_p)})"
        if self.detectable is None:
            return f"inconclusive: {shown}; with {self.n} items no loss at all could be shown"
        return f"inconclusive: {shown}; a drop below {points(self.detectable)} points would go unseen"

    def to_json(self, change: float) -> dict[str, Any]:
        """Return plain values; ``change`` as in `said_change`."""
        figures: dict[str, Any] = {"p": self.p, "detectable": self.detectable, "change": change}
        figures |= {"interval": list(self.interval), "margin": MARGIN, "equivalence_p": self.equivalence_p}
        return {**asdict(self), **figures, "sentence": self.said_of(change)}


def points(share: float, *, signed: bool = False) -> str:
    """Return a share as percentage points, ``2``, ``12.5`` or ``−4.0``."""
    if not signed:
        return f"{100 * share:.1f}".removesuffix(".0")
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def compare(
    base: Mapping[str, bool], model: Mapping[str, bool], *, questions: tuple[object, object] = (None, None)
) -> Paired | str:
    """Pair two models' verdicts by item id; return the reason where they cannot be paired.

    Args:
        base, model: whether each item was answered correctly.
        questions: a hash of all questions of each, where known: ids alone are positions in a file.
    """
    if base.keys() != model.keys() or not base:
        different, total = base.keys() ^ model.keys(), base.keys() | model.keys()
        return f"other items: {len(different)} of {len(total)} are in one of the two only"
    if None not in questions and questions[0] != questions[1]:
        return "other questions under the same ids: the data has changed"
    lost = sum(base[item] and not model[item] for item in base)
    won = sum(model[item] and not base[item] for item in base)
    return Paired(len(base), lost, won)
