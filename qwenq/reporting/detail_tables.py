"""Make the tables that a card does not have: closeness to the base; speed and memory in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwenq.reporting.card import attention
from qwenq.reporting.collect import Collection, Measured
from qwenq.reporting.tables import Cell, Layout, Table, pivot
from qwenq.reporting.text import clean
from qwenq.reporting.units import format_of
from qwenq.results import Model

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
