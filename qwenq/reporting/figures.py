"""Turn rows into figures as data, which plots.py draws: what rows hold, nothing smoothed or filled in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwenq.reporting.card import model_bytes, task_name
from qwenq.reporting.collect import FASTEST_OF, Collection, Measured, at_one_point, decode_rows, point_text
from qwenq.reporting.losses import bases_of, distinguish, losses
from qwenq.reporting.text import GIB
from qwenq.statistics import mean_over_modules


def frontier(points: Sequence[Point], *, less: bool) -> tuple[Point, ...]:
    """Return the points in order of x, each marked with whether another one beats it (Pareto dominance).

    More y is better; so is ``less`` x, as of bytes, or more, as of speed.
    """
    places = [(-point.x if less else point.x, point.y) for point in points]
    marked = (
        replace(point, beaten=any(place != (x, y) and place[0] >= x and place[1] >= y for place in places))
        for point, (x, y) in zip(points, places, strict=True)
    )
    return tuple(sorted(marked, key=lambda point: point.x))


Kind = Literal["points", "lines", "stack", "balance"]


@dataclass(frozen=True)
class Point:
    """One mark: ``low`` and ``high`` bound y; ``label`` is shown beside it or when it is pointed at.

    ``beaten``: another mark of its series is at least as good on both axes and better on one.
    """

    x: float
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None
    beaten: bool = False


@dataclass(frozen=True)
class Series:
    """Marks that belong together."""

    name: str
    points: tuple[Point, ...]
    tone: str  # which colour: a precision, or ``c0`` … ``c5``, ``lost``, ``won``
    dashed: bool = False  # a line for comparison

    @property
    def joined(self) -> tuple[Point, ...]:
        """Return the marks that a line joins: those on the frontier."""
        return tuple(point for point in self.points if not point.beaten)


@dataclass(frozen=True)
class Figure:
    """One plot."""

    key: str  # file name and anchor
    # ``points``, of which the trade-off frontier is joined; ``lines``; ``stack``: bars whose x is the
    # category's index; ``balance``: bars to the left and right of zero
    kind: Kind
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    categories: tuple[str, ...] = ()  # of bars, top to bottom
    log_y: bool = False  # whether y is on a logarithmic scale


def figures_of(collection: Collection, family: str) -> Iterator[Figure]:
    """Yield the figures that a family's rows have data for."""
    for make in (_by_size, _by_speed, _balance, _decode, _memory, _kl, _layers, _bits):
        if (figure := make(collection, family)).series:
            yield figure


def _by_size(collection: Collection, family: str) -> Figure:
    found = model_bytes(collection, family).items()
    sizes = {(model.fingerprint, model.precision): nbytes / 1e6 for model, nbytes in found}
    series = _accuracies(collection, family, sizes, less=True)
    return Figure(
        "accuracy_size", "points", "Accuracy against size", "weights, MB", "accuracy, %", series,
        f"Up and to the left is better. {_FRONTIER}",
    )  # fmt: skip


def _by_speed(collection: Collection, family: str) -> Figure:
    rows = decode_rows(collection, family)
    speeds = {(item.row.model.fingerprint, item.row.model.precision): item.row.value for item in rows}
    series = _accuracies(collection, family, speeds, less=False)
    return Figure(
        "accuracy_speed", "points", "Accuracy against speed", "tokens/s", "accuracy, %", series,
        f"Up and to the right is better. {_FRONTIER} Speed with each model's fastest attention: "
        f"{point_text(rows, without=FASTEST_OF)}.",
    )  # fmt: skip


_FRONTIER = (
    "A line joins the models that no other beats on both axes as measured, which is the trade-off; those "
    "that one does are hollow. Bars are 95 % intervals: within them the order may be chance."
)


def _accuracies(
    collection: Collection, family: str, places: Mapping[tuple[str, str], float | None], *, less: bool
) -> tuple[Series, ...]:
    """Make one series per task, one point per model; tasks with one point show no trade-off.

    ``places`` are on the other axis, by fingerprint and precision; ``less``: of it less is better.
    """
    tasks: dict[str, list[Measured]] = defaultdict(list)
    for item in collection.of(family, "accuracy"):
        tasks[str(item.row.point.get("task"))].append(item)
    made: list[Series] = []
    for rows in tasks.values():
        points = [
            Point(x, y * 100, collection.label(row.model), _percent(row.low), _percent(row.high))
            for row in (item.row for item in at_one_point(rows, anywhere=True))
            if (x := places.get((row.model.fingerprint, row.model.precision))) is not None
            and (y := row.value) is not None
        ]
        if len(points) > 1:
            tone = f"c{len(made) % 6}"
            made.append(Series(task_name(rows[0].row), frontier(points, less=less), tone))
    return tuple(made)


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _balance(collection: Collection, family: str) -> Figure:
    found = [loss for loss in losses(collection, family) if loss.tested]
    names, lost, won = [], [], []
    bases = bases_of(found, collection)
    for index, (loss, place) in enumerate(zip(found, distinguish(found, collection), strict=True)):
        against = f" against {collection.label(loss.before.model)}" if len(bases) > 1 else ""
        where = f", {place}" if place else ""
        names.append(f"{task_name(loss.after)}, {collection.label(loss.after.model)}{against}{where}")
        if test := loss.tested:
            lost.append(Point(index, -test.pairing.lost, str(test.pairing.lost)))
            won.append(Point(index, test.pairing.won, str(test.pairing.won)))
    return Figure(
        "items", "balance", "Items lost and won", "items", "",
        (Series("lost", tuple(lost), "lost"), Series("won", tuple(won), "won")) if found else (),
        f"Items that exactly one of both models got right, against {' and '.join(bases)}.",
        categories=tuple(names),
    )  # fmt: skip


def _decode(collection: Collection, family: str) -> Figure:
    curves = [item for item in collection.of(family, "speed.decode") if _curve(item)]
    rows = at_one_point(curves, fastest_of=FASTEST_OF)
    series = tuple(_line(collection, item) for item in rows)
    return Figure(
        "decode", "lines", "Speed of decoding over position", "tokens in the cache", "tokens/s", series,
        f"Each with its fastest attention: {point_text(rows, without=FASTEST_OF)}.",
    )  # fmt: skip


def _kl(collection: Collection, family: str) -> Figure:
    rows = at_one_point([item for item in collection.of(family, "kl") if _curve(item)], anywhere=True)
    series = tuple(_line(collection, item) for item in rows)
    return Figure(
        "kl", "lines", "KL divergence by position", "position in the text", "nats a token", series,
        "How far each model's next-token distribution is from the unquantised one's, by how much text it has "
        "read. Bars are 95 % intervals.",
    )  # fmt: skip


def _line(collection: Collection, item: Measured) -> Series:
    """Return a row's curve, with the intervals of ``lows`` and ``highs`` where every mark has a pair."""
    curve, bounds = _curve(item), [item.row.details.get(key) for key in ("lows", "highs")]
    whole = all(isinstance(found, list) and len(found) == len(curve) for found in bounds)
    points = []
    for (x, y), *pair in zip(curve, *(bounds if whole else ()), strict=True):
        known = len(pair) == 2 and all(map(_number, pair)) and pair[0] <= pair[1]
        points.append(Point(x, y, "", *pair) if known else Point(x, y))
    return Series(collection.label(item.row.model), tuple(points), item.row.model.precision)


def _curve(item: Measured) -> list[tuple[float, float]]:
    """Return ``positions`` and ``values`` of a row's details; empty if these are not two lists of numbers.

    Some rows of decoding have the ``seconds`` of a step at each position instead.
    """
    xs, ys = item.row.details.get("positions"), item.row.details.get("values")
    seconds = item.row.details.get("seconds")
    if ys is None and isinstance(seconds, list) and all(_number(one) and one > 0 for one in seconds):
        ys = [1 / one for one in seconds]
    if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
        return []
    pairs = list(zip(xs, ys, strict=True))
    return pairs if len(pairs) > 1 and all(_number(x) and _number(y) for x, y in pairs) else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


PARTS = ("weights", "cache", "activations", "other")


def _memory(collection: Collection, family: str) -> Figure:
    rows = at_one_point([item for item in collection.of(family, "memory.generate") if _parts(item)])
    series = []
    for place, name in enumerate(PARTS):
        points = [Point(i, _parts(item).get(name, 0.0) / GIB) for i, item in enumerate(rows)]
        if any(point.y for point in points):
            series.append(Series(name, tuple(points), f"c{place}"))
    categories = tuple(collection.label(item.row.model) for item in rows)
    return Figure(
        "memory", "stack", "Memory by part", "GiB", "", tuple(series), f"At {point_text(rows)}.",
        categories,
    )  # fmt: skip


def _parts(item: Measured) -> dict[str, float]:
    parts = item.row.details.get("parts")
    if not isinstance(parts, dict):
        return {}
    return {str(k): float(v) for k, v in parts.items() if k in PARTS and _number(v) and v >= 1}


_LAYER = re.compile(r"(?:layers|h)\.(\d{1,6})\.", re.ASCII)


def _layers(collection: Collection, family: str) -> Figure:
    """Plot the mean relative error of each layer's modules beside that of rounding to nearest."""
    rows = at_one_point(
        [item for item in collection.of(family, "kl") if _by_layer(item, "error")], anywhere=True
    )
    series, mixed = [], any(_of_experts(item) for item in rows)
    together = ", a layer's experts together as one of each linear" if mixed else ""
    for item in rows:
        name, tone = collection.label(item.row.model), item.row.model.precision
        series.append(Series(name, _by_layer(item, "error"), tone))
        if nearest := _by_layer(item, "rtn_error"):
            series.append(Series(f"{name}, rounded to nearest", nearest, tone, dashed=True))
    return Figure(
        "layers", "lines", "Error of each layer", "layer", "relative error, %", tuple(series),
        "On held-out text, each layer with the unquantised model's input: the squared error of its output, "
        f"relative to it, mean over its modules{together}. Quantising minimises another error, on "
        "calibration text, which counts what the layers before have changed: there no module is worse than "
        "rounding to nearest, here one may be.",
        log_y=True,
    )  # fmt: skip


def _of_experts(item: Measured) -> bool:
    """Return whether modules of experts are among those measured."""
    modules = item.row.details.get("modules")
    named = (module.get("name") for module in modules or () if isinstance(module, dict))
    return any(".experts." in str(name) for name in named)


def _bits(collection: Collection, family: str) -> Figure:
    """Plot what each size would cost where 8 bits go where they count most, and the size that was chosen."""
    series, tokens = [], set()
    for item in collection.of(family, "kl"):
        found = item.row.details.get("mixed_bits")
        curve = found.get("curve") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(curve, list) or len(curve) < 2:
            continue
        marks = [*curve, [found.get("bytes"), found.get("remaining")]]
        if not all(isinstance(mark, list) and len(mark) == 2 and all(map(_number, mark)) for mark in marks):
            continue
        *line, chosen = (Point(size / 1e6, kl) for size, kl in marks)
        name, tone = collection.label(item.row.model), item.row.model.precision
        series.append(Series(name, tuple(line), tone, dashed=True))
        series.append(Series(f"{name}: chosen", (replace(chosen, label="chosen"),), tone))
        tokens.add(found.get("tokens"))
    return Figure(
        "bits", "lines", "Size against what it costs", "weights, MB", "sum of KL divergences, nats/token",
        tuple(series),
        "Each group of layers was rounded to 4 bits alone, and the whole model's divergence from its base "
        f"measured on {' and '.join(sorted(map(str, tokens)))} calibration tokens. The line is the least sum "
        "of these over the groups that stay in 4 bits, the others having 8: for each size the best choice.",
    )  # fmt: skip


def _by_layer(item: Measured, key: str) -> tuple[Point, ...]:
    modules = item.row.details.get("modules")
    layers: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for module in modules if isinstance(modules, list) else []:
        found = _LAYER.search(str(module.get("name"))) if isinstance(module, dict) else None
        if found and _number(module.get(key)) and module[key] > 0:
            layers[int(found[1])].append((str(module["name"]), float(module[key]) * 100))
    points = tuple(Point(layer, mean_over_modules(errors)) for layer, errors in sorted(layers.items()))
    return points if len(points) > 1 else ()
