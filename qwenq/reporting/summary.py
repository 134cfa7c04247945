"""Summarise each quantised model in a sentence: what it saves and what it costs."""

from __future__ import annotations

from collections.abc import Iterator

from qwenq.evals.verdict import judge
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
        if top is None:
            yield shown
        else:
            word = judge(kl, top, 8 if model.precision == "int8" else 4).word
            yield f"{word}, {shown}, same top token {100 * top:.1f} %"


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
    if base is None or base == model:
        yield shown
    else:
        share = f"{100 * sizes[model] / sizes[base]:.0f} %"
        yield f"{shown}, {share} of {collection.label(base)}"


def _speed(collection: Collection, family: str, model: Model) -> Iterator[str]:
    """Yield the speed of decoding, relative to the base; each with its fastest attention.

    The base is the fastest unquantised model if the dtype of the quantised one is unknown.
    """
    rows = {item.row.model: item.row for item in decode_rows(collection, family)}
    if (row := rows.get(model)) is None:
        return
    plain = {other.model.precision: other for other in rows.values() if other.model.precision in PLAIN}
    dtype = row.settings.get("dtype")
    fastest = max(plain.values(), key=lambda other: other.value or 0.0, default=None)
    base = choose_base(plain, dtype) if dtype else fastest
    write = format_of(row.metric, row.unit)
    if base is None or not base.value or base.model == model:
        yield f"decodes {write(row.value or 0.0)} {write.unit}"
        return
    ratio, name = (row.value or 0.0) / base.value, collection.label(base.model)
    slower = " (slower)" if ratio < 1 else ""
    yield f"decodes {ratio:.2f} × as fast as {name}{slower}"


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
