"""Summarise each quantised model in a sentence: what it saves and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

from qwenq.paired.base import PLAIN, choose_base
from qwenq.paired.compare import Paired
from qwenq.paired.headline import Compared, headline
from qwenq.reporting.card import TASKS
from qwenq.reporting.collect import Collection
from qwenq.reporting.detail_tables import model_bytes
from qwenq.reporting.losses import Loss, bases_of, losses
from qwenq.reporting.selection import at_one_point, decode_rows
from qwenq.reporting.text import clean
from qwenq.reporting.units import format_of
from qwenq.results import Model


def summary_of(collection: Collection, family: str) -> Iterator[str]:
    """``Int4: 62% of the BF16 bytes; decodes 1.60 × as fast as BF16; KL divergence 0.1397 …``.

    Each figure names the unquantised model that it is relative to: the one that was measured where it was, in
    the same dtype if there is one.
    """
    models = dict.fromkeys(item.row.model for item in collection.of(family))
    if not any(model.precision in PLAIN for model in models):
        return
    found = losses(collection, family)
    tests = sum(loss.p is not None for loss in found)
    for model in models:
        if model.precision in PLAIN:
            continue
        parts = [
            *_size(collection, family, model),
            *_speed(collection, family, model),
            *_closeness(collection, family, model),
            *_accuracy(collection, [loss for loss in found if loss.after.model == model], tests),
        ]
        if parts:
            yield f"{collection.label(model)}: {'; '.join(parts)}."


def _size(collection: Collection, family: str, model: Model) -> Iterator[str]:
    """Beside the precision that it was run in first; what it is stored as knows no dtype."""
    sizes = model_bytes(collection, family)
    dtypes = (item.row.settings.get("dtype") for item in collection.of(family) if item.row.model == model)
    plain = {other.precision: other for other, nbytes in sizes.items() if nbytes}
    base = choose_base(plain, next(filter(None, dtypes), None))
    if model in sizes and base is not None:
        yield f"{sizes[model] / sizes[base]:.0%} of the {collection.label(base)} bytes"


def _speed(collection: Collection, family: str, model: Model) -> Iterator[str]:
    rows = {item.row.model: item.row for item in decode_rows(collection, family)}
    if (row := rows.get(model)) is None:
        return
    base = choose_base({row.model.precision: row for row in rows.values()}, row.settings.get("dtype"))
    if base is not None and base.value:
        yield f"decodes {(row.value or 0.0) / base.value:.2f} × as fast as {collection.label(base.model)}"


def _closeness(collection: Collection, family: str, model: Model) -> Iterator[str]:
    for item in at_one_point(collection.of(family, "kl"), anywhere=True):
        if item.row.model == model and item.row.value is not None:
            yield f"KL divergence {format_of('kl', item.row.unit)(item.row.value)} nats a token"


def _accuracy(collection: Collection, found: list[Loss], tests: int) -> Iterator[str]:
    """Yield the largest drop, what the items could have shown, and the verdict; nothing without a pairing."""
    tested = [
        Compared(_task(loss), loss.before.value or 0.0, loss.after.value or 0.0, loss.pairing, loss.p)
        for loss in found
        if isinstance(loss.pairing, Paired) and loss.p is not None
    ]
    if tested:
        bases = " and ".join(bases_of(found, collection))
        yield f"against {bases}, {headline(tested, tests, len(found) - len(tested))}"


def _task(loss: Loss) -> str:
    task = str(loss.after.point.get("task"))
    return TASKS.get(task, clean(task))
