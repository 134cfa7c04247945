"""A model beside its base on the same items: what was lost, what was won, and what this sample could show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwenq.paired.detectable import detectable_drop
from qwenq.paired.mcnemar import ALPHA, mcnemar

BASES = ("fp32", "bf16", "fp16")
"""Precisions of unquantised models: quantised ones are compared with the first of these that was measured."""


@dataclass(frozen=True)
class Paired:
    """Two models on the same items.

    Attributes:
        n: items that both answered.
        lost: the base had them right, the model wrong.
        won: the other way round.
        p: exact two-sided McNemar.
        detectable: smallest detectable drop as a share; None: no drop at all would be found.
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
        return self.said_of(self.change)

    def said_of(self, change: float) -> str:
        """The sentence for a change that was averaged otherwise, over subjects say; only its size counts."""
        points = f"{100 * abs(change):.1f} points"
        if self.p < ALPHA:
            return f"{'lost' if self.lost > self.won else 'gained'} {points} (p {readable_p(self.p)})"
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


def readable_p(p: float) -> str:
    """A p-value for people, with its sign: ``= 0.012`` or ``< 0.001``."""
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"
