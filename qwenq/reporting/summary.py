"""A sentence for each quantised model: what it bought and what it cost, next to the unquantised one."""

from __future__ import annotations

from collections.abc import Iterator

from qwenq.reporting.card import TASKS
from qwenq.reporting.collect import Collection, reference
from qwenq.reporting.detail_tables import model_bytes
from qwenq.reporting.losses import Loss, losses
from qwenq.reporting.selection import at_one_point, decode_rows
from qwenq.reporting.text import clean
from qwenq.reporting.units import format_of, signed
from qwenq.results import Model


def summary_of(collection: Collection, family: str) -> Iterator[str]:
    """``Int4: 31% of the unquantised bytes; decodes 1.60 × as fast as BF16; KL divergence 0.1397 …``."""
    models = list(dict.fromkeys(item.row.model for item in collection.of(family)))
    base = reference(models)
    found = losses(collection, family)
    for model in models:
        if base is None or model.precision in {"fp32", "bf16", "fp16"}:
            continue
        parts = [
            *_size(collection, family, model, base),
            *_speed(collection, family, model, base),
            *_closeness(collection, family, model),
            *_accuracy([loss for loss in found if loss.after.model == model]),
        ]
        if parts:
            yield f"{collection.label(model)}: {'; '.join(parts)}."


def _size(collection: Collection, family: str, model: Model, base: Model) -> Iterator[str]:
    sizes = model_bytes(collection, family)
    if model in sizes and sizes.get(base):
        yield f"{sizes[model] / sizes[base]:.0%} of the unquantised bytes"


def _speed(collection: Collection, family: str, model: Model, base: Model) -> Iterator[str]:
    speeds = {item.row.model: item.row.value or 0.0 for item in decode_rows(collection, family)}
    if model in speeds and speeds.get(base):
        yield f"decodes {speeds[model] / speeds[base]:.2f} × as fast as {collection.label(base)}"


def _closeness(collection: Collection, family: str, model: Model) -> Iterator[str]:
    for item in at_one_point(collection.of(family, "kl"), anywhere=True):
        if item.row.model == model and item.row.value is not None:
            yield f"KL divergence {format_of('kl', item.row.unit)(item.row.value)} nats a token"


def _accuracy(found: list[Loss]) -> Iterator[str]:
    tested = [loss for loss in found if loss.p is not None]
    if not tested:
        return
    worse = [loss for loss in tested if loss.significant]
    if not worse:
        yield f"no significant loss of accuracy in {len(tested)} task{'s' if len(tested) > 1 else ''}"
        return
    named = (f"{_task(loss)} ({signed(_points(loss))} points)" for loss in worse)
    yield f"significantly less accurate in {len(worse)} of {len(tested)} tasks: {', '.join(named)}"


def _task(loss: Loss) -> str:
    task = str(loss.after.point.get("task"))
    return TASKS.get(task, clean(task))


def _points(loss: Loss) -> float:
    return ((loss.after.value or 0.0) - (loss.before.value or 0.0)) * 100
