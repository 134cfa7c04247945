"""Write the headline of several comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwenq.paired.compare import Paired, points
from qwenq.paired.equivalence import MARGIN
from qwenq.paired.mcnemar import ALPHA, said_p, shown_p


@dataclass(frozen=True)
class Compared:
    """One comparison of a model with its base.

    Attributes:
        name: of the task.
        before, after: scores as shares.
        pairing: item by item.
        p: McNemar's, corrected by Holm.
    """

    name: str
    before: float
    after: float
    pairing: Paired
    p: float

    @property
    def change(self) -> float:
        """Return the change of the score."""
        return self.after - self.before

    @property
    def lost(self) -> bool:
        """Return whether more items were lost than won, beyond chance."""
        return self.p < ALPHA and self.pairing.lost > self.pairing.won


def headline(found: Sequence[Compared], tests: int, unpaired: int = 0) -> str:
    """Return one sentence on all comparisons of a model: largest drop, power, verdict.

    Args:
        found: the model's comparisons, at least one.
        tests: how many p values were corrected together.
        unpaired: tasks that could not be compared item by item.
    """
    worst = min(found, key=lambda one: (one.change, one.pairing.change))
    pairing = worst.pairing
    fell = "fell most" if worst.change < 0 else "did least well (no score fell)"
    corrected = f", {shown_p(worst.p)} after Holm's correction for {tests} tests" if tests > 1 else ""
    figures = f"{pairing.said_change(worst.change)}; {said_p(pairing.p)}{corrected}"
    shown = f"{100 * worst.before:.1f} → {100 * worst.after:.1f} %"
    return f"{worst.name} {fell}: {shown} ({figures}); {_power_text(pairing)}; {verdict(found, unpaired)}"


def verdict(found: Sequence[Compared], unpaired: int = 0) -> str:
    """Return the verdict: a loss, no loss beyond the margin, or inconclusive."""
    apart = f"; {unpaired} not compared item by item" if unpaired else ""
    tasks = f"{len(found)} task{'s' if len(found) > 1 else ''}"
    if lost := [one.name for one in found if one.lost]:
        return f"verdict: a loss in {len(lost)} of {tasks} ({', '.join(lost)}){apart}"
    unsure = [one for one in found if not one.pairing.equivalent]
    if not unsure and not unpaired:
        largest = max(one.pairing.equivalence_p for one in found)
        return f"verdict: no loss beyond {points(MARGIN)} points in {tasks} (TOST, {said_p(largest)})"
    excluded = f"TOST excludes a change of {points(MARGIN)} points in {len(found) - len(unsure)} of {tasks}"
    return f"verdict: inconclusive ({excluded}{apart})"


def _power_text(pairing: Paired) -> str:
    """Return whether these items could have shown a drop that matters."""
    if pairing.detectable is None:
        return f"with {pairing.n:,} items no drop at all could have been shown"
    power = f"its {pairing.n:,} items show a drop of {points(pairing.detectable)} points 4 times in 5"
    return power if pairing.detectable <= MARGIN else f"{power}, but not one of {points(MARGIN)}"
