"""Test what quantising cost in accuracy, and summarise each quantised model in a sentence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qwenq.comparison import (
    PLAIN,
    Paired,
    TaskComparison,
    choose_base,
    corrected_p,
    guessing_level,
    headline,
    judge_check,
    paired,
)
from qwenq.reporting.card import cut_of, model_bytes, task_name, task_order
from qwenq.reporting.collect import FASTEST_OF, Collection, Measured, at_one_point, decode_rows
from qwenq.reporting.tables import MISSING, Cell, Line, Table
from qwenq.reporting.text import PERCENT, clean, fixed, format_of, signed
from qwenq.results import Model, Row, Value, intervals_overlap
from qwenq.statistics import ALPHA, format_p


@dataclass(frozen=True)
class Loss:
    """One accuracy beside that of the unquantised model."""

    # before, after: unquantised, quantised
    before: Row
    after: Row
    pairing: Paired | str  # item by item; or why there is none
    p: float | None = None  # corrected by Holm for all losses of this family; None without a pairing
    run: str = ""  # that ``after`` was measured in

    @property
    def change(self) -> float:
        """Return the change of the score, as a share."""
        return (self.after.value or 0.0) - (self.before.value or 0.0)

    @property
    def tested(self) -> TaskComparison | None:
        """Return the comparison item by item; None without a pairing."""
        if isinstance(self.pairing, str) or self.p is None:
            return None
        before, after = self.before.value or 0.0, self.after.value or 0.0
        return TaskComparison(task_name(self.after), before, after, self.pairing, self.p)


def losses(collection: Collection, family: str) -> list[Loss]:
    """Return a loss for each accuracy of a quantised model whose base was measured at the same point.

    BF16 against FP32 is not a cost of quantising and is not tested.
    """
    found = list(_pairs(collection.of(family, "accuracy")))
    corrected = corrected_p([loss.pairing for loss in found])
    made = (replace(loss, p=p) for loss, p in zip(found, corrected, strict=True))
    return sorted(made, key=lambda loss: task_order(loss.after))


def _pairs(items: Iterable[Measured]) -> Iterator[Loss]:
    """Yield each quantised model with the base that was measured at the same point, the last per precision.

    A row that names its base is paired with those weights only, whatever has the same name.
    """
    measured = [item for item in items if item.row.status == "ok"]
    plain: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
    for item in measured:
        if item.row.model.precision in PLAIN:
            plain[_point(item.row.point)].append(item.row)
    for item in measured:
        if (row := item.row).model.precision in PLAIN:
            continue
        named, at = row.details.get("base"), plain[_point(row.point)]
        bases = {one.model.precision: one for one in at if named in (None, one.model.fingerprint)}
        if (base := choose_base(bases, row.settings.get("dtype"))) is not None:
            yield Loss(base, row, paired(base, row), run=item.run.name)


def _point(point: dict[str, Value]) -> tuple[tuple[str, str], ...]:
    """Return what two precisions of one measurement share: all but engine and dtype."""
    return tuple(sorted((key, str(value)) for key, value in point.items() if key not in {"engine", "dtype"}))


FIGURES = (
    *("Unquantised (%)", "Quantised (%)", "Difference (points)", "Items lost", "Items won"),
    *("p", "p (Holm)", "Detectable drop (points)"),
)
WORDS = "In words"
"""Heading of the plain description of a loss, which stands beside its labels."""


def loss_table(collection: Collection, family: str) -> Table | None:
    """Make one line per loss or gain; None without a comparison."""
    found = losses(collection, family)
    if not found:
        return None
    bases = bases_of(found, collection)
    caption = [
        f"against {bases[0] if len(bases) == 1 else 'the unquantised model named'}, item by item",
        "p: McNemar's exact test on the items that exactly one of both got right, two-sided",
        "p (Holm): corrected for all tests of this table",
        "detectable drop: the smallest that so many items would have shown 4 times in 5, by one such test",
    ]
    tests = sum(loss.p is not None for loss in found)
    made, places = [], distinguish(found, collection)
    for loss, place in zip(found, places, strict=True):
        named = [task_name(loss.after), collection.label(loss.after.model)]
        named += [collection.label(loss.before.model)] if len(bases) > 1 else []
        named += [place or MISSING] if any(places) else []
        words, test = "not tested", loss.tested
        if test:
            words = test.pairing.describe_change(test.change, test.p, tests)
            if guess := _guess(loss):
                words += f"; {collection.label(loss.before.model)} is {guess}, so no loss can show"
        labels = (Cell(label, label) for label in [*named, words])
        made.append(Line((*labels, *_cells(loss))))
    optional = [*(["Against"] if len(bases) > 1 else []), *(["Where"] if any(places) else [])]
    titles = ("Task", "Quantization", *optional, WORDS)
    return Table("losses", "What it cost", (*titles, *FIGURES), len(titles), tuple(made), tuple(caption))


def _guess(loss: Loss) -> str:
    """Return how the base's score is no better than guessing, from which little can be lost; else empty."""
    level = guessing_level(loss.before)
    if level is None or (isinstance(loss.pairing, Paired) and loss.pairing.p < ALPHA):
        return ""
    return f"at guessing level ({100 * level:.0f} %)" if level else "without a right answer"


def distinguish(found: Sequence[Loss], collection: Collection) -> list[str]:
    """Return what distinguishes each loss from others of its task and model: keys of its point, its run."""
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, loss in enumerate(found):
        labels = (collection.label(loss.after.model), collection.label(loss.before.model))
        alike[str(loss.after.point.get("task")), *labels].append(index)
    notes = [""] * len(found)
    for group in (indices for indices in alike.values() if len(indices) > 1):
        points = [found[index].after.point for index in group]
        keys = dict.fromkeys(key for point in points for key in point)
        differing = [key for key in keys if len({str(point.get(key)) for point in points}) > 1]
        runs = {found[index].run for index in group}
        for index, point in zip(group, points, strict=True):
            parts = [f"{key} {point.get(key)}" for key in differing if point.get(key) is not None]
            parts += [f"run {found[index].run}"] if len(runs) > 1 else []
            notes[index] = clean(", ".join(parts))
    return notes


def bases_of(found: Iterable[Loss], collection: Collection) -> list[str]:
    """Return the labels of all bases, usually one."""
    return list(dict.fromkeys(collection.label(loss.before.model) for loss in found))


def _cells(loss: Loss) -> tuple[Cell, ...]:
    before, after = loss.before.value or 0.0, loss.after.value or 0.0
    test = loss.tested
    mark = "significant" if test and test.lost else ""
    shown = (
        Cell(PERCENT(before), before),
        Cell(PERCENT(after), after),
        Cell(signed(loss.change * 100), loss.change, mark=mark if loss.change < 0 else ""),
    )
    if test is None:
        missing, untested = Cell(MISSING), Cell("n/a", note=str(loss.pairing))
        return (*shown, missing, missing, untested, missing, missing)
    pairing, drop = test.pairing, test.pairing.detectable
    return (
        *shown,
        Cell(f"{pairing.lost:,}", pairing.lost),
        Cell(f"{pairing.won:,}", pairing.won),
        Cell(format_p(pairing.p), pairing.p),
        Cell(format_p(test.p), test.p, mark=mark),
        Cell("none" if drop is None else fixed(1)(drop * 100), drop),
    )


def summary_of(collection: Collection, family: str) -> Iterator[str]:
    """Yield ``Int4: fair, KL divergence 0.1040 nats/token, …; 171.2 MB, 64 % of BF16; …``.

    Each ratio names the unquantised model that it is relative to: the one that was measured at the same
    point, in the same dtype if there is one.
    """
    rows = collection.of(family)
    models = dict.fromkeys(item.row.model for item in rows)
    quantised = [model for model in models if model.precision not in PLAIN]
    found = losses(collection, family)
    tests = sum(loss.p is not None for loss in found)
    if any(item.row.settings.get("weights") == "random" for item in rows):
        yield "Random weights: speed and memory are those of the architecture; the answers mean nothing."
    for model in quantised or models:
        parts = [
            *_closeness(collection, family, model),
            *_size(collection, family, model),
            *_speed(collection, family, model),
            *_accuracy(collection, [loss for loss in found if loss.after.model == model], tests),
        ]
        if parts:
            yield f"{collection.label(model)}: {'; '.join(parts)}."


def _closeness(collection: Collection, family: str, model: Model) -> Iterator[str]:
    """Yield the check's verdict with its figures."""
    for item in at_one_point(collection.of(family, "kl"), anywhere=True):
        if item.row.model != model or (kl := item.row.value) is None:
            continue
        shown = f"KL divergence {format_of('kl', item.row.unit)(kl)} nats/token"
        same = [other.row for other in collection.of(family, "same_top") if other.row.model == model]
        top = next((row.value for row in same if row.point == item.row.point), None)
        if top is not None:
            word: str = judge_check(kl, top, 8 if model.precision.endswith("8") else 4, item.row.n).word
            word = "too few tokens for a verdict" if word == "none" else word
            shown = f"{word}, {shown}, same top token {100 * top:.1f} %"
        yield shown


def _size(collection: Collection, family: str, model: Model) -> Iterator[str]:
    """Yield the size, relative to the base in the dtype that the model was run in."""
    sizes = model_bytes(collection, family)
    if model not in sizes:
        return
    write = format_of("size", "bytes")
    shown = f"{write(sizes[model])} {write.unit}"
    dtypes = (item.row.settings.get("dtype") for item in collection.of(family) if item.row.model == model)
    plain = {other.precision: other for other, nbytes in sizes.items() if nbytes}
    base = choose_base(plain, next(filter(None, dtypes), None))
    if base is not None and base != model:
        shown += f", {100 * sizes[model] / sizes[base]:.0f} % of {collection.label(base)}"
    yield shown


def _speed(collection: Collection, family: str, model: Model) -> Iterator[str]:
    """Yield the speed of decoding, and what it is relative to the base; each with its fastest attention.

    Whole generations by the clock are added where they turn the comparison round.
    """
    rows = {item.row.model: item.row for item in decode_rows(collection, family)}
    if (row := rows.get(model)) is None:
        return
    write, base = format_of(row.metric, row.unit), _speed_base(rows, row)
    length = f" over {tokens:,} tokens" if type(tokens := row.point.get("tokens")) is int else ""
    shown = f"decodes {write(row.value or 0.0)} {write.unit}{length}"
    if base is None:
        yield shown
        return
    name, ratio = collection.label(base.model), (row.value or 0.0) / (base.value or 1.0)
    yield f"{shown}, {_times(ratio, name, noise=bool(intervals_overlap(row, base)))}"
    whole = at_one_point(collection.of(family, "speed.protocol"), fastest_of=FASTEST_OF)
    clocked = {item.row.model: item.row for item in whole if item.row.metric != row.metric}
    if model in clocked and base.model in clocked and (before := clocked[base.model].value):
        by_clock = (clocked[model].value or 0.0) / before
        if (by_clock < 1) != (ratio < 1):
            whole_length = clocked[model].point.get("tokens")
            yield f"a whole generation of {whole_length} tokens by the clock is {_times(by_clock, name)}"


def _times(ratio: float, name: str, *, noise: bool = False) -> str:
    remark = " (within noise)" if noise else " (slower)" if ratio < 1 else ""
    return f"{ratio:.2f} × as fast as {name}{remark}"


def _speed_base(rows: dict[Model, Row], row: Row) -> Row | None:
    """Return the base in the model's dtype, or the fastest where that is unknown; None for a base."""
    plain = {other.model.precision: other for other in rows.values() if other.model.precision in PLAIN}
    dtype = row.settings.get("dtype")
    fastest = max(plain.values(), key=lambda other: other.value or 0.0, default=None)
    base = choose_base(plain, dtype) if dtype else fastest
    return None if base is None or not base.value or base.model == row.model else base


def _accuracy(collection: Collection, found: list[Loss], tests: int) -> Iterator[str]:
    """Yield the largest drop, what the items could have shown, and the verdict; nothing without a pairing.

    Scores that cannot show a loss, and those that many cut answers make worthless, are named behind it.
    """
    if tested := [test for loss in found if (test := loss.tested)]:
        bases = " and ".join(bases_of(found, collection))
        yield f"against {bases}, {headline(tested, tests, len(found) - len(tested))}"
    guessed: dict[str, list[str]] = defaultdict(list)
    for loss in found:
        if guess := _guess(loss):
            guessed[f"{collection.label(loss.before.model)} is {guess}"].append(task_name(loss.after))
    for what, tasks in guessed.items():
        yield f"{what} in {' and '.join(tasks)}, so no loss can show there"
    for loss in found:
        for row in (loss.before, loss.after):
            if (cut := cut_of(row)) is not None and cut.many:
                yield f"warning: {task_name(loss.after)}, {collection.label(row.model)}: {cut.warning}"
