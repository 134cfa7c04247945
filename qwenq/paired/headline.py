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
    worst = min(found, key=_change)
    fell = "fell most" if worst.change < 0 else "did least well (no score fell)"
    parts = [f"{worst.name} {fell}: {_figures(worst, tests)}"]
    losses = [one for one in found if one.lost]
    if losses and worst not in losses:  # the largest drop may be chance where a smaller one is not
        loss = min(losses, key=_change)
        parts.append(f"{loss.name} is the largest significant loss: {_figures(loss, tests)}")
    return "; ".join([*parts, _power_text(worst.pairing), verdict(found, unpaired)])


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


def _change(one: Compared) -> tuple[float, float]:
    return one.change, one.pairing.change


def _figures(one: Compared, tests: int) -> str:
    """Return scores, change, interval and p values of one comparison."""
    corrected = f", {shown_p(one.p)} after Holm's correction for {tests} tests" if tests > 1 else ""
    figures = f"{one.pairing.said_change(one.change)}; {said_p(one.pairing.p)}{corrected}"
    return f"{100 * one.before:.1f} → {100 * one.after:.1f} % ({figures})"
