"""Compare a model with its base on the same items: the pairing, the base's choice, the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from qwenq.results import Row
from qwenq.statistics import (
    ALPHA,
    MARGIN,
    change_interval,
    detectable_drop,
    equivalence_p,
    format_p,
    holm,
    mcnemar,
    p_phrase,
)

PLAIN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precisions of unquantised models, the preferred first, and the dtype that each is computed in."""

T = TypeVar("T")


def choose_base(measured: Mapping[str, T], dtype: object) -> T | None:
    """Return what was measured of the base; None where no unquantised model was measured.

    The base in the dtype of the quantised model comes first, as rounding activations has a cost that is not
    the quantisation's; then the order of `PLAIN`.

    Args:
        measured: values by precision; precisions that are not in `PLAIN` are ignored.
        dtype: of the quantised model's computation, ``settings["dtype"]`` of its row; None: unknown.
    """
    alike = [precision for precision, name in PLAIN.items() if name == dtype]
    return next((measured[precision] for precision in (*alike, *PLAIN) if precision in measured), None)


GUESSING = {"mmlu": 0.25, "ceval": 0.25, "cmmlu": 0.25, "gpqa-diamond": 0.25, "mmlu-pro": 0.1}
"""Share of items that guessing gets right, of tasks with letters to choose from."""


def guessing_level(row: Row) -> float | None:
    """Return the share that guessing gets right, where the interval of an accuracy reaches down to it.

    Of tasks without letters it is 0: not one item was answered correctly.
    """
    level = GUESSING.get(str(row.point.get("task")), 0.0)
    if row.metric != "accuracy" or row.value is None:
        return None
    low = row.low if level and row.low is not None else row.value
    return level if low <= level else None


@dataclass(frozen=True)
class Paired:
    """Verdicts of two models on the same items."""

    n: int  # items
    lost: int  # items that the base answered correctly and the model did not
    won: int  # items that the model answered correctly and the base did not

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

    def format_change(self, change: float) -> str:
        """Return a change of the score with the interval of what the items show.

        An average over subjects may change otherwise than the share of items, which is what the test is
        about; then both are given.
        """
        low, high = (points(bound, signed=True) for bound in self.interval)
        interval = f"95 % interval {low} to {high}"
        score, items = points(change, signed=True), points(self.change, signed=True)
        if score == items:
            return f"{score} points, {interval}"
        return f"{score} points; all items alike {items}, {interval}"

    def describe_change(self, change: float, p: float | None = None, tests: int = 1) -> str:
        """Return the verdict on a change of the score: loss, gain, no loss beyond a margin, inconclusive.

        Of several tests that are shown together, ``p`` is corrected for their number.
        """
        shown = self.format_change(change)
        if self.p < ALPHA:
            found = f"{'loss' if self.lost > self.won else 'gain'}: {shown} ({p_phrase(self.p)})"
            by_chance = p is not None and p >= ALPHA
            return f"{found}, which one of {tests} tests may show by chance" if by_chance else found
        if self.equivalent:
            return f"no loss beyond {points(MARGIN)} points: {shown} (TOST, {p_phrase(self.equivalence_p)})"
        if self.detectable is None:
            return f"inconclusive: {shown}; with {self.n} items no loss at all could be shown"
        return f"inconclusive: {shown}; a drop below {points(self.detectable)} points would go unseen"

    def to_json(self, change: float) -> dict[str, Any]:
        """Return plain values; ``change`` as in `format_change`."""
        figures: dict[str, Any] = {"p": self.p, "detectable": self.detectable, "change": change}
        figures |= {"interval": list(self.interval), "margin": MARGIN, "equivalence_p": self.equivalence_p}
        return {**asdict(self), **figures, "sentence": self.describe_change(change)}


def points(share: float, *, signed: bool = False) -> str:
    """Return a share as percentage points, ``2``, ``12.5`` or ``−4.0``."""
    if not signed:
        return f"{100 * share:.1f}".removesuffix(".0")
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def pair_verdicts(
    base: Mapping[str, bool], model: Mapping[str, bool], *, questions: tuple[object, object] = (None, None)
) -> Paired | str:
    """Pair two models' verdicts by item id; return the reason where they cannot be paired.

    ``questions`` is a hash of all questions of each, where known: ids alone are positions in a file.
    """
    if base.keys() != model.keys() or not base:
        different, total = base.keys() ^ model.keys(), base.keys() | model.keys()
        return f"other items: {len(different)} of {len(total)} are in one of the two only"
    if None not in questions and questions[0] != questions[1]:
        return "other questions under the same ids: the data has changed"
    lost = sum(base[item] and not model[item] for item in base)
    won = sum(model[item] and not base[item] for item in base)
    return Paired(len(base), lost, won)


def corrected_p(pairings: Sequence[Paired | str | None]) -> list[float | None]:
    """Return McNemar's p of each pairing, corrected by Holm for all of them; None where there is none."""
    tests = {index: one.p for index, one in enumerate(pairings) if isinstance(one, Paired)}
    found = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [found.get(index) for index in range(len(pairings))]


@dataclass(frozen=True)
class TaskComparison:
    """One comparison of a model with its base."""

    name: str
    # before, after: scores as shares
    before: float
    after: float
    pairing: Paired  # item by item
    p: float  # McNemar's, corrected by Holm

    @property
    def change(self) -> float:
        """Return the change of the score."""
        return self.after - self.before

    @property
    def lost(self) -> bool:
        """Return whether more items were lost than won, beyond chance."""
        return self.p < ALPHA and self.pairing.lost > self.pairing.won


def headline(found: Sequence[TaskComparison], tests: int, unpaired: int = 0) -> str:
    """Return one sentence on all comparisons of a model, at least one: largest drop, power, verdict.

    So many p values were corrected together (``tests``), so many tasks not compared item by item.
    """
    worst = min(found, key=_change)
    moved = "fell most" if worst.change < 0 else "did not change" if worst.change == 0 else "rose"
    others = ", and no score fell" if worst.change >= 0 and len(found) > 1 else ""
    parts = [f"{worst.name} {moved}{others}: {_figures(worst, tests)}"]
    losses = [one for one in found if one.lost]
    if losses and worst not in losses:  # the largest drop may be chance where a smaller one is not
        loss = min(losses, key=_change)
        parts.append(f"{loss.name} is the largest significant loss: {_figures(loss, tests)}")
    power = f"with {worst.pairing.n:,} items no drop at all could have been shown"
    if (drop := worst.pairing.detectable) is not None:
        power = f"its {worst.pairing.n:,} items show a drop of {points(drop)} points 4 times in 5"
        power += "" if drop <= MARGIN else f", but not one of {points(MARGIN)}"
    return "; ".join([*parts, power, verdict(found, unpaired)])


def verdict(found: Sequence[TaskComparison], unpaired: int = 0) -> str:
    """Return the verdict: a loss, no loss beyond the margin, or inconclusive."""
    apart = f"; {unpaired} not compared item by item" if unpaired else ""
    tasks = f"{len(found)} task{'s' if len(found) > 1 else ''}"
    if lost := [one.name for one in found if one.lost]:
        return f"verdict: a loss in {len(lost)} of {tasks} ({', '.join(lost)}){apart}"
    unsure = [one for one in found if not one.pairing.equivalent]
    if not unsure and not unpaired:
        largest = max(one.pairing.equivalence_p for one in found)
        return f"verdict: no loss beyond {points(MARGIN)} points in {tasks} (TOST, {p_phrase(largest)})"
    excluded = f"TOST excludes a change of {points(MARGIN)} points in {len(found) - len(unsure)} of {tasks}"
    return f"verdict: inconclusive ({excluded}{apart})"


def _change(one: TaskComparison) -> tuple[float, float]:
    return one.change, one.pairing.change


def _figures(one: TaskComparison, tests: int) -> str:
    """Return scores, change, interval and p values of one comparison."""
    corrected = f", {format_p(one.p)} after Holm's correction for {tests} tests" if tests > 1 else ""
    figures = f"{one.pairing.format_change(one.change)}; {p_phrase(one.pairing.p)}{corrected}"
    return f"{100 * one.before:.1f} → {100 * one.after:.1f} % ({figures})"


def items_of(row: Row) -> Mapping[str, bool] | None:
    """Return correctness by item id; None where the row has no sound record of it."""
    items = row.details.get("items")
    if not isinstance(items, dict) or not items:
        return None
    return items if all(isinstance(correct, bool) for correct in items.values()) else None


NO_RECORD = "no record of single items"


def paired(before: Row, after: Row) -> Paired | str:
    """Return the pairing of two accuracy rows, or why they cannot be paired.

    Rows of a report have no single items, but the counts of the comparison that ``qwenq eval`` made of them.
    """
    first, second = items_of(before), items_of(after)
    if first is None and second is None and (counted := _counted(before, after)) is not None:
        return counted
    if first is None or second is None:
        return NO_RECORD
    return pair_verdicts(
        first, second, questions=(before.details.get("questions"), after.details.get("questions"))
    )


def _counted(before: Row, after: Row) -> Paired | None:
    """Return the recorded counts of ``after`` beside that base; None where there are none that can be."""
    found = after.details.get("paired")
    if not isinstance(found, dict) or found.get("base") != before.model.precision:
        return None
    if after.details.get("base") != before.model.fingerprint:
        return None
    n, lost, won = (found.get(key) for key in ("n", "lost", "won"))
    if not (type(n) is int and type(lost) is int and type(won) is int and n == before.n == after.n):
        return None
    return Paired(n, lost, won) if n > 0 and min(lost, won) >= 0 and lost + won <= n else None


def other_items(before: Row, after: Row) -> str:
    """Return why two accuracies are not over the same items; empty where they are."""
    pairing = paired(before, after)
    if isinstance(pairing, str) and pairing != NO_RECORD:
        return pairing
    if before.n != after.n and None not in (before.n, after.n):
        return f"other items: {after.n} instead of {before.n}"
    return ""


# Judge the cost of quantising by two figures, both of which must reach a band.
#
# The same bands hold for all bits, because the word says how near the model is to its base. They are our own
# choice, set by llama.cpp's published figures for Llama-3-8B on WikiText-2: q8_0 .0014 and 97.7 %, q6_K .0055
# and 96.0 %, q4_K_M .031 and 91.9 %. A sound Int8 is excellent; a sound Int4 is good from 7B parameters on,
# fair below 1B, where each weight carries more.


Word = Literal["excellent", "good", "fair", "poor", "broken", "none"]

BANDS: tuple[tuple[Word, float, float, str], ...] = (
    ("excellent", 0.01, 0.95, "hardly distinguishable from its base"),
    ("good", 0.05, 0.90, "what a sound Int4 of a 7B model reaches"),
    ("fair", 0.25, 0.75, "a visible loss; usual for Int4 below 1B parameters, too much for a large model"),
    ("poor", 2.0, 0.30, "a heavy loss; use more bits, smaller groups, or better calibration text"),
)
"""Word, largest mean KL in nats, smallest share of same top tokens, meaning; the first that fits counts."""
BROKEN = "not the model it was made from: a defect, damaged weights, or another base"
INT8_USUAL = 0.01
"""Mean KL in nats that a sound Int8 stays below at any size; published: .0014 for 8B."""


@dataclass(frozen=True)
class Verdict:
    """A word and a sentence that explains it."""

    word: Word
    sentence: str

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


LEAST_TOKENS = 250
"""Predicted tokens that a verdict takes: a share of same top tokens near 90 % is known to 4 points then."""


def judge_check(kl: float, same_top: float, bits: int, tokens: int | None = None) -> Verdict:
    """Return the verdict on a mean KL (nats), a share of same top tokens and the bits of the weights.

    Of fewer predicted tokens than ``LEAST_TOKENS`` only a broken model is recognised; None: enough.
    """
    measured = f"KL {kl:.4f} nats, same top token {same_top:.1%}"
    for word, largest, smallest, meaning in BANDS:
        if math.isfinite(kl) and kl <= largest and same_top >= smallest:
            if tokens is not None and tokens < LEAST_TOKENS:
                few = f"{tokens} tokens are too few to judge by, {LEAST_TOKENS} the least"
                return Verdict("none", f"{measured}; {few}")
            usual = f"; Int8 usually stays below {INT8_USUAL}" if bits == 8 and kl > INT8_USUAL else ""
            return Verdict(word, f"{measured}: {meaning}{usual}")
    if not math.isfinite(kl):
        return Verdict("broken", "its logits are not finite: weights or activations overflow")
    return Verdict("broken", f"{measured}: {BROKEN}")
