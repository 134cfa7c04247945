"""Make the model card's three tables with its headings, and the published figures beside ours."""

from __future__ import annotations

from typing import Any

from qwenq.published import PublishedRow, published_of
from qwenq.reporting.collect import PRECISIONS, Collection, Measured, rank
from qwenq.reporting.cut import asked_by, cut_of
from qwenq.reporting.tables import Cell, Draft, Layout, Pivot, Table, pivot
from qwenq.reporting.text import clean
from qwenq.reporting.units import fixed
from qwenq.results import Row, Value

TASKS = {
    **{"mmlu": "MMLU", "ceval": "CEval (val)", "gsm8k": "GSM8K", "humaneval": "Humaneval"},
    **{"math": "MATH", "mbpp": "MBPP", "bbh": "BBH", "cmmlu": "CMMLU"},  # on the base models' cards
}
"""Names of tasks as the card's headings have them."""
ATTENTION = {"off": "Disabled", "flash2": "v2", "flash1": "v1", "plain": "Disabled"}
"""Names of attention backends as the card has them; others keep their own."""
GENERATED_2048 = {"qwen-1.8b-chat", "qwen-72b-chat"}
"""Cards whose first memory figure is of generating, as their text says; their heading says encoding."""
_UNRESET = "peak since the process began, loading included, as the cards measured it"
_RESET = "peak of generating alone: the counter is reset after loading, unlike the cards'"


def card_tables(collection: Collection, family: str) -> list[Table]:
    """Make those of the three tables that have measurements."""
    return [
        table for make in (accuracy_table, speed_table, memory_table) if (table := make(collection, family))
    ]


def accuracy_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization | MMLU | CEval (val) | GSM8K | Humaneval; percent of items."""
    rows = collection.of(family, "accuracy")
    if not rows:
        return None
    layout = Layout("Quantization", _task, count="items", used=frozenset({"task"}))
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "percent of items answered correctly, with 95 % intervals")
    made.caption.append(_how_asked(rows))
    _add_cut(made, rows, collection)
    asked = {str(item.row.point.get("task")): _task(item)[1] for item in rows if _as_the_cards(item.row)}
    for row in published_of(family):
        figures = {asked[task]: value for task, value in row.accuracy.items() if task in asked}
        _add_published(made, row, {"Protocol": "card"}, figures, digits=1)
    return made.table("accuracy", "Accuracy")


def _how_asked(rows: list[Measured]) -> str:
    """Return ``letters by logits: MMLU; written answers: GSM8K``."""
    by: dict[str, dict[str, None]] = {"logits": {}, "generation": {}}
    for item in sorted(rows, key=lambda item: task_order(item.row)):
        by[asked_by(item.row)][_task(item)[1]] = None
    parts = {"letters asked by logits": by["logits"], "answers by generation": by["generation"]}
    return "; ".join(f"{how}: {', '.join(tasks)}" for how, tasks in parts.items() if tasks)


def _add_cut(made: Pivot, rows: list[Measured], collection: Collection) -> None:
    """Add the share of answers cut at the limit of tokens, for each task with written answers."""
    for item in sorted(rows, key=lambda item: task_order(item.row)):
        if (found := cut_of(item.row)) is None:
            continue
        score = _task(item)[1]
        heading = f"{score} cut (%)"
        note = made.notes.number(f"{score}: {found.warning}") if found.many else None
        label = collection.label(item.row.model)
        for line in made.lines:
            cell = line.cells.get(score)
            if line.labels[0] == label and cell is not None and cell.value == item.row.value:
                line.cells[heading] = Cell(fixed(1)(100 * found.share), found.share, note=note)
        if heading not in made.columns:
            made.columns.append(heading)


def _as_the_cards(row: Row) -> bool:
    """Whether the benchmark itself was asked as for the cards: else theirs is the score of another thing."""
    asked = row.point.get("protocol"), row.point.get("shots") or None
    return asked == ("card", None) and not {"data", "subjects"} & row.point.keys()


def speed_table(collection: Collection, family: str) -> Table | None:
    """Quantization | FlashAttn | Speed (2048 tokens) | Speed (8192 tokens); tokens per second."""
    rows = collection.of(family, "speed.protocol")
    if not rows:
        return None
    layout = Layout(
        "Quantization",
        _length(
            "Speed ({tokens} tokens)",
            "Speed (encoding {context} tokens)",
            "Speed ({context} + {tokens} tokens)",
        ),
        labels={"attention": "Attention"},
        used=frozenset({"context", "tokens"}),
        names={"attention": attention},
    )
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "tokens/s by the cards' protocol: the wall clock around one generate call")
    for row in published_of(family):
        for kind, pair in row.speed.items():
            if ATTENTION[kind] not in {label for line in made.lines for label in line.labels}:
                continue
            figures = {f"Speed ({n} tokens)": v for n, v in zip((2048, 8192), pair, strict=False)}
            _add_published(made, row, {"Attention": ATTENTION[kind]}, figures, digits=2)
    return made.table("speed", "Speed")


def memory_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization Level | Peak Usage for Encoding 2048 Tokens | … for Generating 8192 Tokens; GiB."""
    rows = collection.of(family, "memory.unreset")
    how = _UNRESET
    if not any(item.row.status == "ok" for item in rows):
        rows, how = collection.of(family, "memory.generate"), _RESET
    if not rows:
        return None
    layout = Layout(
        "Quantization Level",
        _length(
            "Peak Usage for Generating {tokens} Tokens",
            "Peak Usage for Encoding {context} Tokens",
            "Peak Usage for Encoding {context} and Generating {tokens} Tokens",
        ),
        used=frozenset({"context", "tokens"}),
        names={"attention": attention},
    )
    made = pivot(rows, layout, collection)
    made.caption.insert(0, f"GiB (2³⁰ bytes, which the cards call GB); {how}")
    for row in published_of(family):
        doing = "Generating" if row.model in GENERATED_2048 else "Encoding"
        headings = (f"Peak Usage for {doing} 2048 Tokens", "Peak Usage for Generating 8192 Tokens")
        _add_published(made, row, {}, dict(zip(headings, row.memory_gib, strict=False)), digits=2)
    return made.table("memory", "Memory")


def attention(value: Value) -> str:
    """Return a backend's name in the card's words."""
    return ATTENTION.get(str(value), clean(value))


def task_order(row: Row) -> tuple[int, str]:
    """Return the place of a row's task: the card's first, in its order."""
    task = str(row.point.get("task"))
    known = list(TASKS)
    return (known.index(task) if task in known else len(known)), task


def _task(item: Measured) -> tuple[Any, str]:
    order = task_order(item.row)
    return order, TASKS.get(order[1], clean(order[1]))


def _length(generating: str, encoding: str, both: str) -> Any:
    """Make a column for each pair of context and new tokens, encoding first."""

    def column(item: Measured) -> tuple[Any, str]:
        point = item.row.point
        context, tokens = (_count(point.get(key)) for key in ("context", "tokens"))
        template = encoding if tokens <= 1 < context else generating if context <= 1 else both
        return (tokens > 1, context, tokens), template.format(context=context, tokens=tokens)

    return column


def _count(value: Value) -> int:
    return value if isinstance(value, int) else 0


def _add_published(
    made: Pivot, row: PublishedRow, labels: dict[str, str], figures: dict[str, float], digits: int
) -> None:
    """Insert a line of the card below ours of that precision, with the figures that have a column."""
    shown = {heading: value for heading, value in figures.items() if heading in made.columns}
    if not shown:
        return
    note = made.notes.number(f"published: {row.source}, measured on {row.hardware}")
    label = f"{PRECISIONS.get(row.precision.lower(), row.precision)}, published"
    cells = {heading: Cell(fixed(digits)(value), value) for heading, value in shown.items()}
    names = [label, *(labels.get(header, "") for header in made.headers[1:])]
    place = sum(_rank(line.labels[0]) <= rank(row.precision.lower()) for line in made.lines)
    made.lines.insert(place, Draft(names, cells, published=True, note=note))


def _rank(label: str) -> int:
    """Return the place of a line by its label, ``Int4, groups of 64`` or ``Int4, published``."""
    return rank(label.partition(",")[0].lower())
