"""Make the model card's tables with published figures beside ours, and the tables beyond it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwenq.published import PublishedRow, published_of
from qwenq.reporting.collect import PRECISIONS, Collection, Measured, rank
from qwenq.reporting.tables import Cell, Draft, Layout, Pivot, Table, pivot
from qwenq.reporting.text import clean, fixed, format_of
from qwenq.results import Model, Row, Value

# Count answers that were cut at their limit of tokens, most of which are judged wrong.


MANY = 0.02
"""Share of cut answers above which a score is not to be read without a warning."""


@dataclass(frozen=True)
class Cut:
    """How many of the written answers of one row reached their limit."""

    answers: int
    of: int

    @property
    def share(self) -> float:
        """Return the share of all written answers."""
        return self.answers / self.of

    @property
    def many(self) -> bool:
        """Return whether the score needs a warning."""
        return self.share > MANY

    @property
    def warning(self) -> str:
        """Return what a reader must know; of few as of many."""
        return (
            f"{self.answers:,} of {self.of:,} answers ({self.share:.1%}) were cut at their limit of tokens "
            "and are judged as far as they go: raise --max-new-tokens"
        )


def cut_of(row: Row) -> Cut | None:
    """Return the cut answers of a row of accuracy; None where none were written, or none were counted."""
    found = row.details.get("cut")
    if not isinstance(found, dict):
        return None
    answers, of = found.get("answers"), found.get("of")
    if type(answers) is not int or type(of) is not int or not 0 <= answers <= of or of == 0:
        return None
    return Cut(answers, of)


LETTERS = ("mmlu", "ceval", "ceval-test", "cmmlu")


def asked_by(row: Row) -> str:
    """Return how answers were got: ``logits`` or ``generation``.

    Rows of before this was recorded: the base protocols score letters, all else is written.
    """
    asked = row.settings.get("asked")
    if asked in ("logits", "generation"):
        return str(asked)
    letters = row.point.get("task") in LETTERS and row.point.get("protocol") != "card"
    return "logits" if letters else "generation"


# Make the model card's three tables with its headings, and the published figures beside ours.


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
    return rank(label.partition(",")[0])


# Make the tables that a card does not have: closeness to the base; speed and memory in parts.


CLOSENESS = {
    "kl": "KL divergence (nats/token)",
    "same_top": "Same top token (%)",
    "perplexity": "Perplexity",
    "perplexity.ratio": "Perplexity, × unquantised",
}
SPLIT = {
    "time.first_token": "First token (ms)",
    "speed.prefill": "Prefill (tokens/s)",
    "speed.decode": "Decode (tokens/s)",
    "bandwidth.share": "Of the copy bandwidth (%)",
    "energy.token": "Energy (J/token)",
    "memory.load": "Peak at load (GiB)",
    "memory.generate": "Peak at generation (GiB)",
}


def closeness_table(collection: Collection, family: str) -> Table | None:
    """Tabulate how close each model is to the unquantised one, and its bytes."""
    rows = collection.of(family, *CLOSENESS)
    if not rows:
        return None
    made = pivot(rows, Layout("Quantization", _by_metric(CLOSENESS), count="tokens"), collection)
    sizes = {collection.label(model): nbytes for model, nbytes in model_bytes(collection, family).items()}
    heading = "Weights (MB)"
    write = format_of("size", "bytes")
    for line in made.lines:
        if (nbytes := sizes.get(line.labels[0])) is not None:
            line.cells[heading] = Cell(write(nbytes), nbytes)
    made.columns += [heading] if any(heading in line.cells for line in made.lines) else []
    return made.table("closeness", "How near the unquantised model")


def split_table(collection: Collection, family: str) -> Table | None:
    """Tabulate speed and memory in parts: prefill and decoding, loading and generating."""
    rows = collection.of(family, *SPLIT)
    if not rows:
        return None
    layout = Layout("Quantization", _by_metric(SPLIT), names={"attention": attention})
    return pivot(rows, layout, collection).table("split", "Speed and memory, taken apart")


def other_accuracies(collection: Collection, family: str) -> Table | None:
    """Tabulate accuracies by another rule, such as ``accuracy.published``, where any figure differs."""
    found = [item for item in collection.of(family) if item.row.metric.startswith("accuracy.")]
    main = {_answers(item): item.row.value for item in collection.of(family, "accuracy")}
    other = {_task_and_rule(item) for item in found if item.row.value != main.get(_answers(item))}
    rows = [item for item in found if _task_and_rule(item) in other]
    if not rows:
        return None
    layout = Layout("Quantization", _task_and_rule, count="items", used=frozenset({"task"}))
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "percent of the same answers, read by another rule")
    return made.table("accuracies", "The same answers by other rules")


def model_bytes(collection: Collection, family: str) -> dict[Model, int]:
    """Return the bytes of each model's weights, as far as rows record them."""
    return {
        item.row.model: item.row.model.nbytes
        for item in collection.of(family)
        if item.row.model.nbytes is not None
    }


def _by_metric(titles: dict[str, str]) -> Callable[[Measured], tuple[Any, str]]:
    places = {metric: place for place, metric in enumerate(titles)}
    return lambda item: (places[item.row.metric], titles[item.row.metric])


def _answers(item: Measured) -> tuple[object, ...]:
    """Return what an accuracy shares with those of the same answers by other rules."""
    return (
        item.row.model,
        item.run.name,
        *sorted((key, str(value)) for key, value in item.row.point.items()),
    )


def _task_and_rule(item: Measured) -> tuple[Any, str]:
    task, rule = clean(item.row.point.get("task")), clean(item.row.metric.partition(".")[2])
    return (task, rule), f"{task}, {rule}"


# Tabulate perplexity by context length, as the cards of Qwen's base models do.


def long_context_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization | Dynamic NTK | LogN | 1024 | 2048 …; newer models have neither NTK nor LogN."""
    rows = collection.of(family, "perplexity.context")
    if not rows:
        return None
    layout = Layout(
        "Quantization",
        _context_length,
        labels={"ntk": "Dynamic NTK", "logn": "LogN"},
        used=frozenset({"seq_len"}),
        count="tokens",
    )
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "perplexity by tokens of context; all lengths score the same text")
    return made.table("long-context", "Long context")


def _context_length(item: Measured) -> tuple[Any, str]:
    length = item.row.point.get("seq_len")
    return (length if isinstance(length, int) else 0), str(length)
