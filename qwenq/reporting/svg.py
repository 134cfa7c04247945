"""Figures as SVG inside the page: colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from markupsafe import Markup

from qwenq.reporting.figures import Figure, Point, Series
from qwenq.reporting.scale import Axis, bounds, tick_text
from qwenq.reporting.text import clean
from qwenq.reporting.units import fixed

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 26, 40
BAR, GAP = 18, 12
"""Thickness of a bar, and room between two."""
_place = fixed(1)


def draw(figure: Figure) -> Markup:
    """One ``<svg>``; every text in it is escaped."""
    makers: dict[str, Callable[[Figure], tuple[int, list[Markup]]]] = {
        "points": _points,
        "lines": _lines,
        "stack": _stack,
        "balance": _balance,
    }
    height, parts = makers[figure.kind](figure)
    inner = Markup("").join(parts)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, clean(figure.title), inner
    )


def _points(figure: Figure) -> tuple[int, list[Markup]]:
    """Marks with their intervals, the frontier joined; the model's name above its highest mark."""
    x, y = _axes(figure, zero_x=True, zero_y=False)
    parts = [*_grid(figure, x, y)]
    for place, series in enumerate(figure.series):
        parts.append(_path(series.joined, series.tone, x, y, "thin"))
        aside = 3.0 * (place - (len(figure.series) - 1) / 2)  # intervals at one x do not cover each other
        parts += _intervals(series, x, y, aside)
        parts += [_dot(series, point, x, y, figure, 4, aside) for point in series.points]
    return HEIGHT, parts + list(_names(figure, x, y))


def _intervals(series: Series, x: Axis, y: Axis, aside: float = 0.0) -> Iterator[Markup]:
    for point in series.points:
        if point.low is not None and point.high is not None:
            at = x(point.x) + aside
            yield _line(at, y(point.low), at, y(point.high), f"bar t-{series.tone}")


def _names(figure: Figure, x: Axis, y: Axis) -> Iterator[Markup]:
    """Names of models, one each; raised where they would touch the one before."""
    highest: dict[str, tuple[float, float]] = {}
    for point in (point for series in figure.series for point in series.points):
        top = y(point.y if point.high is None else point.high)
        place, before = highest.get(point.label, (x(point.x), top))
        highest[point.label] = (place, min(top, before))
    raised = 0
    ordered = sorted(highest.items(), key=lambda entry: entry[1][0])
    for index, (name, (place, top)) in enumerate(ordered):
        near = index > 0 and place - ordered[index - 1][1][0] < 5.5 * len(name) + 6
        raised = (raised + 1) % 3 if near else 0
        at = min(max(place, LEFT + 14), WIDTH - RIGHT - 14)
        yield _text(at, max(top - 7 - 12 * raised, 11), name, "name", "middle")


def _lines(figure: Figure) -> tuple[int, list[Markup]]:
    x, y = _axes(figure, zero_x=False, zero_y=not figure.log_y)
    parts = [*_grid(figure, x, y)]
    for series in figure.series:
        parts.append(_path(series.points, series.tone, x, y, "line dashed" if series.dashed else "line"))
        parts += _intervals(series, x, y)
        parts += [_dot(series, point, x, y, figure, 2) for point in series.points[:400]]
    return HEIGHT, parts


def _stack(figure: Figure) -> tuple[int, list[Markup]]:
    """Horizontal bars, one a category, their parts behind each other and the total at the end."""
    count = len(figure.categories)
    totals = [sum(series.points[index].y for series in figure.series) for index in range(count)]
    height, names = TOP + count * (BAR + GAP) + BOTTOM, _room(figure)
    x = Axis(0, max(totals) * 1.12, names, WIDTH - RIGHT)
    parts = [*_bar_grid(figure, x, height)]
    for index, name in enumerate(figure.categories):
        top, at = TOP + index * (BAR + GAP), 0.0
        parts.append(_text(names - 8, top + BAR / 2 + 4, name, "name", "end"))
        for series in figure.series:
            size = series.points[index].y
            told = f"{name}, {series.name}: {size:.2f} {figure.x_label}"
            parts.append(_rect(x(at), top, x(at + size) - x(at), BAR, series.tone, told))
            at += size
        parts.append(_text(x(at) + 6, top + BAR / 2 + 4, f"{at:.2f}", "tick", "start"))
    return height, parts


def _balance(figure: Figure) -> tuple[int, list[Markup]]:
    """Bars to the left of zero for what was lost, to the right for what was won."""
    lost, won = figure.series
    widest = max(abs(point.y) for series in figure.series for point in series.points) or 1
    height, names = TOP + len(figure.categories) * (BAR + GAP) + BOTTOM, _room(figure)
    x = Axis(-widest * 1.2, widest * 1.2, names, WIDTH - RIGHT)
    parts = [*_bar_grid(figure, x, height)]
    for index, name in enumerate(figure.categories):
        top, middle = TOP + index * (BAR + GAP), TOP + index * (BAR + GAP) + BAR / 2 + 4
        less, more = lost.points[index], won.points[index]
        parts.append(_text(names - 8, middle, name, "name", "end"))
        parts.append(_rect(x(less.y), top, x(0) - x(less.y), BAR, "lost", f"{name}: {less.label} lost"))
        parts.append(_rect(x(0), top, x(more.y) - x(0), BAR, "won", f"{name}: {more.label} won"))
        parts.append(_text(x(less.y) - 5, middle, less.label, "tick", "end"))
        parts.append(_text(x(more.y) + 5, middle, more.label, "tick", "start"))
    return height, [*parts, _line(x(0), TOP - 6, x(0), height - BOTTOM, "axis")]


def _room(figure: Figure) -> float:
    """For the names of bars, to the left of them."""
    return min(16 + 8.0 * max(len(name) for name in figure.categories), WIDTH / 2)


def _axes(figure: Figure, *, zero_x: bool, zero_y: bool) -> tuple[Axis, Axis]:
    marks = [point for series in figure.series for point in series.points]
    ys = [value for point in marks for value in (point.y, point.low, point.high) if value is not None]
    x = Axis(*bounds((point.x for point in marks), zero=zero_x), LEFT, WIDTH - RIGHT)
    low, high = bounds(ys, zero=zero_y, log=figure.log_y)
    return x, Axis(low, high, HEIGHT - BOTTOM, TOP, figure.log_y)


def _grid(figure: Figure, x: Axis, y: Axis) -> Iterator[Markup]:
    for tick in y.ticks():
        yield _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        yield _text(LEFT - 6, y(tick) + 4, tick_text(tick), "tick", "end")
    for tick in x.ticks():
        yield _line(x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 4, "axis")
        yield _text(x(tick), HEIGHT - BOTTOM + 17, tick_text(tick), "tick", "middle")
    yield _line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")
    yield _text(0, 11, figure.y_label, "title", "start")
    yield _text(WIDTH - RIGHT, HEIGHT - 6, figure.x_label, "title", "end")


def _bar_grid(figure: Figure, x: Axis, height: int) -> Iterator[Markup]:
    for tick in x.ticks(4):
        yield _line(x(tick), TOP - 6, x(tick), height - BOTTOM, "grid")
        yield _text(x(tick), height - BOTTOM + 14, tick_text(abs(tick)), "tick", "middle")
    yield _text(WIDTH - RIGHT, height - 6, figure.x_label, "title", "end")


def _path(points: tuple[Point, ...], tone: str, x: Axis, y: Axis, style: str) -> Markup:
    """A line in as few characters as it can be: a curve of thousands of tokens has thousands of corners."""
    corners = [(_place(x(point.x)), _place(y(point.y))) for point in points]
    kept = corners[:1] + [after for before, after in pairwise(corners) if after != before]
    path = "M" + "L".join(f"{a},{b}" for a, b in kept)
    return Markup('<path class="{} t-{}" d="{}"/>').format(style, _tone(tone), path)


def _dot(
    series: Series, point: Point, x: Axis, y: Axis, figure: Figure, size: int, aside: float = 0
) -> Markup:
    name = f"{series.name}, {point.label}" if point.label else series.name
    told = f"{name}: {point.y:.4g} {figure.y_label} at {point.x:,.6g} {figure.x_label}"
    told, style = (f"{told}; another one beats it", "dot beaten") if point.beaten else (told, "dot")
    return Markup('<circle class="{} t-{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        style, _tone(series.tone), _place(x(point.x) + aside), _place(y(point.y)), size, clean(told)
    )


def _rect(left: float, top: float, width: float, height: float, tone: str, told: str) -> Markup:
    form = Markup('<rect class="t-{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
    places = (_place(left), _place(top), _place(max(width, 0)), _place(height))
    return form.format(_tone(tone), *places, clean(told))


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    form = Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    return form.format(style, *map(_place, (x1, y1, x2, y2)))


def _text(x: float, y: float, text: str, style: str, anchor: str) -> Markup:
    form = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return form.format(style, _place(x), _place(y), anchor, clean(text))


def _tone(tone: str) -> str:
    """A class that the page has a colour for; an unknown precision is grey."""
    return tone if tone in TONES else "other"


TONES = ("fp32", "bf16", "fp16", "int8", "int4", "c0", "c1", "c2", "c3", "c4", "c5", "lost", "won")
