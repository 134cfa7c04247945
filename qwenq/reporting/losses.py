"""What quantising cost in accuracy: items lost and won against the unquantised model; and is it real?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qwenq.paired.compare import Paired
from qwenq.paired.detectable import detectable_drop
from qwenq.reporting.card import TASKS, task_order
from qwenq.reporting.collect import Collection, Measured, reference
from qwenq.reporting.significance import LEVEL, Pairing, holm, paired
from qwenq.reporting.tables import MISSING, Cell, Footnotes, Line, Table
from qwenq.reporting.text import clean
from qwenq.reporting.units import PERCENT, fixed, probability, signed
from qwenq.results import Row, Value


@dataclass(frozen=True)
class Loss:
    """One accuracy beside that of the unquantised model.

    Attributes:
        before, after: unquantised, quantised.
        pairing: item by item; or why there is none.
        p: corrected by Holm for all losses of this family; None without a pairing.
    """

    before: Row
    after: Row
    pairing: Pairing | str
    p: float | None = None

    @property
    def significant(self) -> bool:
        """More items lost than won, and that is no accident."""
        if not isinstance(self.pairing, Pairing) or self.p is None:
            return False
        return self.p < LEVEL and self.pairing.lost > self.pairing.won


def losses(collection: Collection, family: str) -> list[Loss]:
    """Every measured accuracy of a quantised model whose unquantised one was measured at the same point."""
    rows = collection.of(family, "accuracy")
    base = reference(item.row.model for item in rows if item.row.status == "ok")
    if base is None:
        return []
    found = list(_pairs(rows, base.fingerprint, base.precision))
    tested = [loss for loss in found if isinstance(loss.pairing, Pairing)]
    p_values = holm([loss.pairing.p for loss in tested if isinstance(loss.pairing, Pairing)])
    corrected = dict(zip((id(loss) for loss in tested), p_values, strict=True))
    made = [replace(loss, p=corrected.get(id(loss))) for loss in found]
    return sorted(made, key=lambda loss: task_order(loss.after))


def _pairs(rows: list[Measured], fingerprint: str, precision: str) -> Iterator[Loss]:
    before = {
        _point(item.row.point): item.row
        for item in rows
        if (item.row.model.fingerprint, item.row.model.precision) == (fingerprint, precision)
        and item.row.status == "ok"
    }
    for item in rows:
        row = item.row
        same_model = (row.model.fingerprint, row.model.precision) == (fingerprint, precision)
        if row.status == "ok" and not same_model and (base := before.get(_point(row.point))):
            yield Loss(base, row, paired(base, row))


def _point(point: dict[str, Value]) -> tuple[tuple[str, str], ...]:
    """Where two precisions are the same measurement: everything but what the precision decides."""
    return tuple(sorted((key, str(value)) for key, value in point.items() if key not in {"engine", "dtype"}))


HEADERS = (
    *("Task", "Quantization", "Unquantised", "Quantised", "Difference", "Items lost", "Items won"),
    *("p", "p (Holm)", "Detectable drop", "In words"),
)


def loss_table(collection: Collection, family: str) -> Table | None:
    """One line a loss or gain; None where nothing can be compared."""
    found = losses(collection, family)
    if not found:
        return None
    notes = Footnotes()
    bases = {collection.label(loss.before.model) for loss in found}
    caption = [
        f"against {', '.join(sorted(bases))}, item by item",
        "difference in percentage points",
        "p: McNemar's exact test on the items that exactly one of both answered, two-sided",
        "p (Holm): corrected for all tests of this table",
        "detectable drop: the smallest that so many items would have shown 4 times in 5, by one such test",
    ]
    tests = sum(loss.p is not None for loss in found)
    made = tuple(Line(_cells(loss, collection, notes, tests)) for loss in found)
    return Table("losses", "What it cost", HEADERS, 2, made, tuple(caption), tuple(notes.sentences))


def _cells(loss: Loss, collection: Collection, notes: Footnotes, tests: int) -> tuple[Cell, ...]:
    task = str(loss.after.point.get("task"))
    name, label = TASKS.get(task, clean(task)), collection.label(loss.after.model)
    before, after = loss.before.value or 0.0, loss.after.value or 0.0
    mark = "significant" if loss.significant else ""
    shown = (
        Cell(name, name),
        Cell(label, label),
        Cell(PERCENT(before), before),
        Cell(PERCENT(after), after),
        Cell(signed((after - before) * 100), after - before, mark=mark),
    )
    missing = Cell(MISSING)
    if isinstance(loss.pairing, str):
        untested = Cell("n/a", note=notes.number(loss.pairing))
        return (*shown, missing, missing, untested, missing, missing, missing)
    pairing, p = loss.pairing, 1.0 if loss.p is None else loss.p
    drop = detectable_drop(pairing.n, (pairing.lost + pairing.won) / pairing.n)
    found = Paired(pairing.n, pairing.lost, pairing.won, pairing.p, drop)
    words = _in_words(found, after - before, p, tests)
    return (
        *shown,
        Cell(f"{pairing.lost:,}", pairing.lost),
        Cell(f"{pairing.won:,}", pairing.won),
        Cell(probability(pairing.p), pairing.p),
        Cell(probability(p), p, mark=mark),
        Cell("none" if drop is None else fixed(1)(drop * 100), drop),
        Cell(words, words),
    )


def _in_words(found: Paired, change: float, p: float, tests: int) -> str:
    """What can be said of a change alone; and where it may be an accident among so many tests, that."""
    told = found.said_of(change)
    return f"{told}, which one of {tests} tests may show by chance" if found.p < LEVEL <= p else told
