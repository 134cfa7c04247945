"""Make the model card's tables with published figures beside ours, and the tables beyond it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from qwenq.published import PublishedRow, published_of
from qwenq.reporting.collect import ATTENTION, PRECISIONS, Collection, Measured, attention, rank
from qwenq.reporting.tables import Cell, Draft, Layout, Pivot, Table, by_metric, pivot
from qwenq.reporting.text import clean, count, fixed, format_of
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
            "and are judged as they are: raise --max-new-tokens"
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


LETTERS = ("mmlu", "ceval", "cmmlu")


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
_ATTENTION_MEANS = {
    "flash v2": "FlashAttention-2",
    "flash v1": "FlashAttention",
    "plain": "no fused kernel",
    "sdpa": "PyTorch's choice",
    "grouped": "decode steps with a cache layout for CPUs",
    "split": "decode steps whose cache is split over the GPU's thread blocks",
    "best": "the one that was fastest when the model was loaded",
}
GENERATED_2048 = {"qwen-1.8b-chat", "qwen-72b-chat"}
"""Cards whose first memory figure is of generating, as their text says; their heading says encoding."""
_UNRESET = "peak since the process began, loading included, as the cards measured it"
_RESET = "peak of generating alone: the counter is reset after loading, unlike the cards'"


def accuracy_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization | MMLU | CEval (val) | GSM8K | Humaneval; percent of items."""
    rows = collection.of(family, "accuracy")
    layout = Layout("Quantization", _score, count="items", used=frozenset({"task"}))
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "items answered correctly, with 95 % intervals")
    made.caption += [_how_asked(rows), *_guessed(rows)]
    _add_cut(made, rows, collection)
    asked = {str(item.row.point.get("task")): _score(item)[1] for item in rows if _as_the_cards(item.row)}
    for row in published_of(family):
        figures = {asked[task]: value for task, value in row.accuracy.items() if task in asked}
        _add_published(made, row, {"Protocol": "card"}, figures, digits=1)
    return made.table("accuracy", "Accuracy")


def _how_asked(rows: list[Measured]) -> str:
    """Return ``letters by logits: MMLU; written answers: GSM8K``."""
    by: dict[str, dict[str, None]] = {"logits": {}, "generation": {}}
    for item in sorted(rows, key=lambda item: task_order(item.row)):
        by[asked_by(item.row)][task_name(item.row)] = None
    parts = {"letters by logits": by["logits"], "written answers": by["generation"]}
    return "; ".join(f"{how}: {', '.join(tasks)}" for how, tasks in parts.items() if tasks)


def _guessed(rows: list[Measured]) -> list[str]:
    """Return a caption with the tasks of letters in which every model is at the level of guessing."""
    from qwenq.comparison import guessing_level  # with numpy

    levels: dict[str, list[float]] = {}
    for item in sorted(rows, key=lambda item: task_order(item.row)):
        if item.row.metric == "accuracy" and item.row.value is not None:
            levels.setdefault(task_name(item.row), []).append(guessing_level(item.row) or 0.0)
    guessed = [f"{task} ({100 * found[0]:.0f} %)" for task, found in levels.items() if all(found)]
    return [f"at guessing level, where no loss can show: {', '.join(guessed)}"] if guessed else []


def _add_cut(made: Pivot, rows: list[Measured], collection: Collection) -> None:
    """Add the share of answers cut at the limit of tokens, for each task with written answers."""
    for item in sorted(rows, key=lambda item: task_order(item.row)):
        if (found := cut_of(item.row)) is None:
            continue
        score = task_name(item.row)
        heading = f"{score} cut (%)"
        note = f"{score}: {found.warning}" if found.many else ""
        label = collection.label(item.row.model)
        for line in made.lines:
            cell = line.cells.get(_score(item)[1])
            if line.labels[0] == label and cell is not None and cell.value == item.row.value:
                line.cells[heading] = Cell(fixed(1)(100 * found.share), found.share, note=note)
        if heading not in made.columns:
            made.columns.append(heading)


def _as_the_cards(row: Row) -> bool:
    """Return whether the benchmark was asked as for the cards: else theirs is the score of another thing."""
    asked = row.point.get("protocol"), row.point.get("shots") or None
    return asked == ("card", None) and not {"data", "subjects"} & row.point.keys()


def speed_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization | Attention | Speed, 2048 tokens (tokens/s) | Speed, 8192 tokens (tokens/s)."""
    rows = collection.of(family, "speed.protocol")
    layout = Layout(
        "Quantization",
        _length(
            "Speed, {tokens} tokens (tokens/s)",
            "Speed, encoding {context} tokens (tokens/s)",
            "Speed, {context} + {tokens} tokens (tokens/s)",
        ),
        labels={"attention": "Attention"},
        used=frozenset({"context", "tokens"}),
        names={"attention": attention},
    )
    made = pivot(rows, layout, collection)
    made.caption.insert(0, "by the cards' protocol: the wall clock around one generate call")
    if all(item.row.n is None and "warm_up" not in item.row.settings for item in rows if item.row.value):
        made.caption.insert(1, "one generation each, with no warm-up recorded")
    made.caption += attention_meanings(made)
    for row in published_of(family):
        for kind, pair in row.speed.items():
            if ATTENTION[kind] not in {label for line in made.lines for label in line.labels}:
                continue
            lengths = (f"Speed, {n} tokens (tokens/s)" for n in (2048, 8192))
            figures = dict(zip(lengths, pair, strict=False))
            _add_published(made, row, {"Attention": ATTENTION[kind]}, figures, digits=2)
    return made.table("speed", "Speed")


def memory_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization Level | Peak Usage for Encoding 2048 Tokens | … for Generating 8192 Tokens; GiB."""
    rows, how = collection.of(family, "memory.unreset"), _UNRESET
    if not _measured(rows):
        rows, how = collection.of(family, "memory.generate"), _RESET
    layout = Layout(
        "Quantization Level",
        _length(
            "Peak Usage for Generating {tokens} Tokens (GiB)",
            "Peak Usage for Encoding {context} Tokens (GiB)",
            "Peak Usage for Encoding {context} and Generating {tokens} Tokens (GiB)",
        ),
        used=frozenset({"context", "tokens"}),
        names={"attention": attention},
    )
    made = pivot(rows, layout, collection)
    made.caption.insert(0, f"GiB are 2³⁰ bytes, which the cards call GB; {how}")
    for row in published_of(family):
        doing = "Generating" if row.model in GENERATED_2048 else "Encoding"
        headings = (
            f"Peak Usage for {doing} 2048 Tokens (GiB)",
            "Peak Usage for Generating 8192 Tokens (GiB)",
        )
        _add_published(made, row, {}, dict(zip(headings, row.memory_gib, strict=False)), digits=2)
    return made.table("memory", "Memory")


def _measured(rows: list[Measured]) -> bool:
    return any(item.row.status == "ok" for item in rows)


def attention_meanings(made: Pivot) -> list[str]:
    """Return what the names of attention mean where they have a column."""
    if "Attention" not in made.headers:
        return []
    place = made.headers.index("Attention")
    used = {line.labels[place] for line in made.lines}
    said = "; ".join(f"{name} is {means}" for name, means in _ATTENTION_MEANS.items() if name in used)
    return [f"attention: {said}"] if said else []


def task_order(row: Row) -> tuple[int, str]:
    """Return the place of a row's task: the card's first, in its order."""
    task = str(row.point.get("task"))
    known = list(TASKS)
    return (known.index(task) if task in known else len(known)), task


def task_name(row: Row) -> str:
    """Return the name of a row's task as the card's headings have it."""
    task = str(row.point.get("task"))
    return TASKS.get(task, clean(task))


def _score(item: Measured) -> tuple[Any, str]:
    return task_order(item.row), f"{task_name(item.row)} (%)"


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
    note = f"published: {row.source}, measured on {row.hardware}"
    label = f"{PRECISIONS.get(row.precision.lower(), row.precision)}, published"
    cells = {heading: Cell(fixed(digits)(value), value) for heading, value in shown.items()}
    names = [label, *(labels.get(header, "") for header in made.headers[1:])]
    ranks = [rank(line.labels[0].partition(",")[0]) for line in made.lines]  # of "Int4, groups of 64"
    place = sum(one <= rank(row.precision.lower()) for one in ranks)
    made.lines.insert(place, Draft(names, cells, published=True, note=note))


# Make the tables that a card does not have: closeness to the base; speed and memory in parts.


CLOSENESS = {
    "kl": "KL divergence (nats/token)",
    "same_top": "Same top token (%)",
    "perplexity": "Perplexity",
    "perplexity.ratio": "Perplexity, × base",
}
SPLIT = {
    "time.first_token": ("First token", "ms"),
    "speed.prefill": ("Prefill", "tokens/s"),
    "speed.decode": ("Decode", "tokens/s"),
    "bandwidth.share": ("Share of copy bandwidth", "%"),
    "energy.token": ("Energy", "J/token"),
    "memory.load": ("Peak at load", "GiB"),
    "memory.generate": ("Peak", "GiB"),
}
"""Name and unit of each metric; between them stands the length that it was measured at."""


def closeness_table(collection: Collection, family: str) -> Table | None:
    """Tabulate how close each model is to the unquantised one, and its bytes."""
    layout = Layout("Quantization", by_metric(CLOSENESS), names={"text": _text_name}, count="tokens")
    made = pivot(collection.of(family, *CLOSENESS), layout, collection)
    sizes = {collection.label(model): nbytes for model, nbytes in model_bytes(collection, family).items()}
    heading = "Weights (MB)"
    write = format_of("size", "bytes")
    for line in made.lines:
        if (nbytes := sizes.get(line.labels[0])) is not None:
            line.cells[heading] = Cell(write(nbytes), nbytes)
    made.columns += [heading] if any(heading in line.cells for line in made.lines) else []
    return made.table("closeness", "How near the unquantised model")


def _text_name(value: Value) -> str:
    return "held out of what the model wrote" if value == "held out of self" else clean(value)


def split_table(collection: Collection, family: str) -> Table | None:
    """Tabulate speed and memory in parts, each length in a column: prompt and decoding, loading and work.

    Peaks of a process whose counter was not reset are in the memory table; where there are none, that table
    has the peaks at work, and they are not repeated here.
    """
    twice = not _measured(collection.of(family, "memory.unreset"))
    rows = [
        item
        for metric in SPLIT
        if not (twice and metric == "memory.generate")
        for item in _of_prompts_or_answers(collection.of(family, metric), metric)
    ]
    lengths = {metric: {_length_of(item) for item in rows if item.row.metric == metric} for metric in SPLIT}
    places = list(SPLIT)

    def column(item: Measured) -> tuple[Any, str]:
        metric, (context, tokens) = item.row.metric, _length_of(item)
        name, unit = SPLIT[metric]
        at = (
            f", {context} + {tokens} tokens"
            if context > 1 and tokens > 1
            else f", {max(context, tokens)} tokens"
        )
        if metric == "memory.generate":
            at = f", {'encoding' if tokens <= 1 < context else 'generating'}{at.removeprefix(',')}"
        elif metric == "time.first_token":
            at = f" after {count(context, 'tokens')}"
        elif metric == "memory.load" or (len(lengths[metric]) == 1 and unit in ("%", "J/token")):
            at = ""
        heading = f"{name}{at} ({unit})"
        return (places.index(metric), tokens > 1, context, tokens), heading

    layout = Layout(
        "Quantization", column, used=frozenset({"context", "tokens"}), names={"attention": attention}
    )
    made = pivot(rows, layout, collection)
    made.caption += attention_meanings(made)
    return made.table("split", "Speed and memory, taken apart")


def _of_prompts_or_answers(rows: list[Measured], metric: str) -> list[Measured]:
    """Keep what a column is about: the first token of prompts, the peak at load of one length."""
    if metric == "time.first_token":
        prompts = [item for item in rows if _length_of(item)[1] <= 1 < _length_of(item)[0]]
        if prompts:
            return prompts
    if metric in ("time.first_token", "memory.load") and rows:
        counted = Counter(map(_length_of, rows))
        chosen = max(counted, key=lambda length: (counted[length], length[1]))
        return [item for item in rows if _length_of(item) == chosen]
    return rows


def _length_of(item: Measured) -> tuple[int, int]:
    return _count(item.row.point.get("context")), _count(item.row.point.get("tokens"))


def other_accuracies(collection: Collection, family: str) -> Table | None:
    """Tabulate accuracies by another rule, such as ``accuracy.published``, where any figure differs."""
    found = [item for item in collection.of(family) if item.row.metric.startswith("accuracy.")]
    main = {item.place: item.row.value for item in collection.of(family, "accuracy")}
    other = {_task_and_rule(item) for item in found if item.row.value != main.get(item.place)}
    rows = [item for item in found if _task_and_rule(item) in other]
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


def _task_and_rule(item: Measured) -> tuple[Any, str]:
    task, rule = clean(item.row.point.get("task")), clean(item.row.metric.partition(".")[2])
    return (task, rule), f"{task}, {rule}"


# Tabulate perplexity by context length, as the cards of Qwen's base models do.


def long_context_table(collection: Collection, family: str) -> Table | None:
    """Make Quantization | Dynamic NTK | LogN | 1024 | 2048 …; newer models have neither NTK nor LogN."""
    layout = Layout(
        "Quantization",
        lambda item: (_count(item.row.point.get("seq_len")), str(item.row.point.get("seq_len"))),
        labels={"ntk": "Dynamic NTK", "logn": "LogN"},
        used=frozenset({"seq_len"}),
        count="tokens",
    )
    made = pivot(collection.of(family, "perplexity.context"), layout, collection)
    made.caption.insert(0, "perplexity by tokens of context; all lengths score the same text")
    return made.table("long-context", "Long context")
