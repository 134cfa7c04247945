"""Draw figures with matplotlib: PNG and SVG files for documents, inline SVG for the page."""

from __future__ import annotations

import io
import logging
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qwenq.reporting.figures import Figure, Point, Series
from qwenq.reporting.text import clean
from qwenq.storage import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.transforms import Transform

COLOURS = {
    "fp32": "#737985", "bf16": "#2566ad", "fp16": "#2566ad", "int8": "#11836a", "int4": "#cf5b16",
    "c0": "#2566ad", "c1": "#cf5b16", "c2": "#11836a", "c3": "#8450b4", "c4": "#a87a08", "c5": "#737985",
    "lost": "#c04a16", "won": "#11836a", "other": "#737985",
}  # fmt: skip
"""Colours of tones on light paper; the page's style has a variable for each, for light and for dark."""
_INK, _QUIET, _RULE, _PAPER = "#1c1e21", "#63686f", "#e3e4e2", "#ffffff"
_VARIABLES = {
    **{colour: f"var(--{tone})" for tone, colour in COLOURS.items()},
    **{_INK: "var(--ink)", _QUIET: "var(--quiet)", _RULE: "var(--rule)", _PAPER: "var(--paper)"},
}
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "qwenq",  # the same figures give the same file
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "text.color": _INK,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _QUIET,
    "axes.labelcolor": _QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": _RULE,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_FORMATS: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""Metadata of each format: without dates and versions, so that the same figures give the same file."""
LONGEST_NAME = 40
"""Characters of a name beside an axis: longer ones would leave no room for the axes."""
MOST_MARKS = 400
"""Points of a line that are marked and have a tooltip."""


_TONES = {"awq-int4": "c3", "ct-int4": "c4", "ct-int8": "c3", "fp8": "c4", "ct-fp8": "c3"}


def tone_of(tone: str) -> str:
    """Return a tone that there is a colour for: an unknown precision is grey."""
    tone = _TONES.get(tone, tone)
    return tone if tone in COLOURS else "other"


def write_plot(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with the endings ``.png`` and ``.svg``.

    Raises:
        StorageError: the disk refused.
    """
    written = []
    with _canvas(figure, (5.2, 3.4)) as (canvas, axes):
        axes.set_title(clean(figure.title))
        if len(figure.series) > 1:
            axes.legend()
        for ending in _FORMATS:
            target = path.with_name(f"{path.name}.{ending}")
            atomic_write_bytes(target, _saved(canvas, ending))  # drawn first: no half file under its name
            written.append(target)
    return written


def inline_svg(figure: Figure) -> Markup:
    """Return one ``<svg>`` for the page, which shows title and legend itself; every text is escaped."""
    with _canvas(figure, (3.7, 2.6)) as (canvas, _):  # a phone's width, where its text can be read
        root = ET.fromstring(_saved(canvas, "svg"))  # noqa: S314 - matplotlib's own
    _add_tooltips(figure, root)
    drawing = _themed(root)
    drawing.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": clean(figure.title)}
    return Markup(ET.tostring(drawing, encoding="unicode"))  # noqa: S704 - ElementTree escapes


def _saved(canvas: Canvas, ending: str) -> bytes:
    drawn = io.BytesIO()
    canvas.savefig(drawn, format=ending, dpi=160, metadata=_FORMATS[ending])
    return drawn.getvalue()


@contextmanager
def _canvas(figure: Figure, size: tuple[float, float]) -> Iterator[tuple[Canvas, Axes]]:
    """Draw a figure with neither title nor legend; what is done to it inside has our style, too.

    matplotlib warns of every character that its font lacks; a box in a plot shows that already.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    logger, style = logging.getLogger("matplotlib"), dict[Any, Any](_STYLE)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
            canvas = Canvas(figsize=size, layout="constrained")
            axes = canvas.subplots()
            axes.set_xlabel(clean(figure.x_label, LONGEST_NAME))
            axes.set_ylabel(clean(figure.y_label, LONGEST_NAME))
            if figure.kind in {"stack", "balance"}:
                _bars(figure, axes)
            else:
                _curves(figure, canvas, axes)
            yield canvas, axes
    finally:
        logger.setLevel(before)


def _curves(figure: Figure, canvas: Canvas, axes: Axes) -> None:
    from matplotlib.transforms import ScaledTranslation

    marks = figure.kind == "points"
    for index, series in enumerate(figure.series):
        # Moved aside by points, so that intervals at one x do not cover each other.
        aside = 3.0 / 72 * (index - (len(figure.series) - 1) / 2) if marks else 0.0
        moved = axes.transData + ScaledTranslation(aside, 0, canvas.dpi_scale_trans)
        _curve(axes, index, series, moved, marks=marks)
    points = [point for series in figure.series for point in series.points]
    heights = [(p.x, y) for p in points for y in (p.y, p.low, p.high) if y is not None]
    axes.update_datalim(heights)  # matplotlib leaves out what is moved
    axes.autoscale_view()
    if marks:
        axes.set_xlim(left=0)
        _names(figure, canvas, axes)
    elif figure.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own would be set as mathematics
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.set_ylim(bottom=0)


def _curve(axes: Axes, index: int, series: Series, moved: Transform, *, marks: bool) -> None:
    """Draw the series of that index; ``marks``: large ones joined by a thin line, instead of small ones."""
    colour, size = COLOURS[tone_of(series.tone)], 5.0 if marks else 2.5
    shown: Any = {"color": colour, "markersize": size, "transform": moved}
    axes.plot(
        [point.x for point in series.joined],
        [point.y for point in series.joined],
        linestyle="--" if series.dashed else "-",
        linewidth=1 if marks or series.dashed else 1.8,
        marker=None if series.dashed or len(series.joined) > MOST_MARKS else "o",
        label=clean(series.name),
        gid=f"joined-{index}",
        **shown,
    )
    beaten = [point for point in series.points if point.beaten]
    if beaten:
        xs, ys = [point.x for point in beaten], [point.y for point in beaten]
        axes.plot(xs, ys, "o", markerfacecolor=_PAPER, gid=f"beaten-{index}", **shown)
    for point in series.points:
        if point.low is not None and point.high is not None:
            bounds = ([point.x, point.x], [point.low, point.high])
            axes.plot(*bounds, color=colour, alpha=0.5, linewidth=1, zorder=1, transform=moved)


def _names(figure: Figure, canvas: Canvas, axes: Axes) -> None:
    """Write each model's name once, above its highest mark; raised where it would touch another."""
    highest: dict[str, tuple[float, float]] = {}
    for point in (point for series in figure.series for point in series.points):
        top = point.y if point.high is None else point.high
        x, before = highest.get(point.label, (point.x, top))
        highest[point.label] = (x, max(top, before))
    width = axes.get_xlim()[1] or 1.0
    points = 72 * 0.8 * canvas.get_size_inches()[0]  # of the axes' width, nearly
    raised, last = 0, float("-inf")
    for name, (x, top) in sorted(highest.items(), key=lambda entry: entry[1][0]):
        near = (x - last) / width * points < 4.6 * len(name) + 6
        raised, last = (raised + 1) % 3 if near else 0, x
        above: Any = {"xytext": (0, 4 + 10 * raised), "textcoords": "offset points"}
        axes.annotate(clean(name, LONGEST_NAME), (x, top), fontsize=8, ha="center", **above)


def _bars(figure: Figure, axes: Axes) -> None:
    rows = range(len(figure.categories))
    stacked, left = figure.kind == "stack", [0.0] * len(figure.categories)
    for index, series in enumerate(figure.series):
        widths = [point.y for point in series.points]
        colour = COLOURS[tone_of(series.tone)]
        bars = axes.barh(rows, widths, left=left if stacked else None, height=0.6, color=colour)
        bars.set_label(clean(series.name))
        for row, bar in enumerate(bars):
            bar.set_gid(f"bar-{index}-{row}")
        left = [before + width for before, width in zip(left, widths, strict=True)]
        if not stacked:
            axes.bar_label(bars, [point.label for point in series.points], padding=3, fontsize=8)
        elif index == len(figure.series) - 1:
            axes.bar_label(bars, [f"{total:.2f}" for total in left], padding=3, fontsize=8)
    if not stacked:
        axes.axvline(0, color=_QUIET, linewidth=0.8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.margins(x=0.12)
    axes.set_yticks(rows, [clean(name, LONGEST_NAME) for name in figure.categories])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


_NAMESPACE = "{http://www.w3.org/2000/svg}"
_KEPT = {
    "fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "fill-opacity", "stroke-opacity",
    "opacity", "font-size", "font-weight", "text-anchor",
}  # fmt: skip
"""Properties of matplotlib's ``style`` that become attributes; the font is the page's."""


def _add_tooltips(figure: Figure, root: ET.Element) -> None:
    """Give every mark and bar a ``<title>``, which browsers show when it is pointed at."""
    found = {group.get("id"): group for group in root.iter(f"{_NAMESPACE}g")}
    for index, series in enumerate(figure.series):
        beaten = [point for point in series.points if point.beaten]
        for kind, points in (("joined", list(series.joined)), ("beaten", beaten)):
            group = found.get(f"{kind}-{index}")
            marks = [] if group is None else list(group.iter(f"{_NAMESPACE}use"))
            if len(marks) == len(points):
                for mark, point in zip(marks, points, strict=True):
                    mark.set("r", "2.5" if figure.kind == "points" else "1.4")
                    ET.SubElement(mark, f"{_NAMESPACE}title").text = _tooltip(figure, series, point)
        for row, (name, point) in enumerate(zip(figure.categories, series.points, strict=False)):
            for bar in found.get(f"bar-{index}-{row}", ()):
                value = point.label or f"{point.y:.2f} {figure.x_label}"
                text = clean(f"{name}, {series.name}: {value}")
                ET.SubElement(bar, f"{_NAMESPACE}title").text = text


def _tooltip(figure: Figure, series: Series, point: Point) -> str:
    name = f"{series.name}, {point.label}" if point.label else series.name
    place = f"{point.y:.4g} {figure.y_label} at {point.x:,.6g} {figure.x_label}"
    return clean(f"{name}: {place}{'; another one is better on both axes' if point.beaten else ''}")


def _themed(old: ET.Element) -> ET.Element:
    """Return a copy for the page: variables for colours, attributes for styles, circles for marks."""
    tag = old.tag.removeprefix(_NAMESPACE)
    style = dict(part.strip().split(": ", 1) for part in old.get("style", "").split(";") if ": " in part)
    new = ET.Element(tag, {key: _VARIABLES.get(value, value) for key, value in style.items() if key in _KEPT})
    if tag == "use":
        new.tag = "circle"
        new.attrib |= {"cx": old.get("x", "0"), "cy": old.get("y", "0"), "r": old.get("r", "2")}
    else:
        new.attrib |= {key: old.attrib[key] for key in ("d", "x", "y", "transform") if key in old.attrib}
    if tag == "text" and "fill" not in style:
        new.set("fill", _VARIABLES[_INK])
    new.text = old.text.strip() if old.text else None
    for child in old:
        if child.tag.removeprefix(_NAMESPACE) not in {"defs", "metadata"}:
            new.append(_themed(child))
    return new
