"""Figures as files, PNG and SVG, by matplotlib, for documents; the page draws its own (``svg``)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import UsageError
from qwenq.reporting.figures import Figure
from qwenq.reporting.text import clean
from qwenq.storage import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "fp32": "#737985", "bf16": "#2566ad", "fp16": "#2566ad", "int8": "#11836a", "int4": "#cf5b16",
    "c0": "#2566ad", "c1": "#cf5b16", "c2": "#11836a", "c3": "#8450b4", "c4": "#a87a08", "c5": "#737985",
    "lost": "#c04a16", "won": "#11836a",
}  # fmt: skip
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "qwenq",  # the same figures give the same file
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#63686f",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e4e2",
    "xtick.color": "#63686f",
    "ytick.color": "#63686f",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def require_matplotlib() -> None:
    """Before the first plot, and before a text that shows it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError("plots need matplotlib", hint="pip install 'qwenq[report]'") from error


def write_plot(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` with the endings ``.png`` and ``.svg``.

    Raises:
        UsageError: matplotlib is not installed.
        StorageError: the disk refused.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    written = []
    style: Any = _STYLE  # matplotlib's stubs want a dictionary of literals
    with rc_context(style), _quiet_fonts():
        canvas = Canvas(figsize=(5.2, 3.4), layout="constrained")
        axes = canvas.subplots()
        _draw(figure, axes)
        for ending, facts in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            target = path.with_name(path.name + ending)
            drawn = io.BytesIO()  # first, so that nothing half is ever there under its name
            canvas.savefig(drawn, format=ending.removeprefix("."), dpi=160, metadata=facts)
            atomic_write_bytes(target, drawn.getvalue())
            written.append(target)
    return written


def _draw(figure: Figure, axes: Axes) -> None:
    axes.set_title(clean(figure.title))
    axes.set_xlabel(clean(figure.x_label))
    axes.set_ylabel(clean(figure.y_label))
    if figure.kind in {"stack", "balance"}:
        _bars(figure, axes)
    else:
        _curves(figure, axes)
    if len(figure.series) > 1:
        axes.legend()


def _curves(figure: Figure, axes: Axes) -> None:
    for series in figure.series:
        marks = figure.kind == "points"
        colour = COLOURS.get(series.tone, "#737985")
        (line,) = axes.plot(
            [point.x for point in series.joined],
            [point.y for point in series.joined],
            color=colour,
            linestyle="--" if series.dashed else "-",
            linewidth=1 if marks or series.dashed else 1.8,
            marker="o" if marks else None,
            markersize=5,
        )
        line.set_label(clean(series.name))
        for point in (point for point in series.points if point.beaten):
            axes.plot(point.x, point.y, "o", markersize=5, color=colour, markerfacecolor="white")
        for point in series.points:
            if point.low is not None and point.high is not None:
                axes.vlines(point.x, point.low, point.high, color=colour, alpha=0.5, linewidth=1, zorder=1)
    if figure.kind == "points":
        _names(figure, axes)
        axes.set_xlim(left=0)
    elif figure.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own would be set as mathematics
    else:
        axes.set_ylim(bottom=0)


def _names(figure: Figure, axes: Axes) -> None:
    """Each model's name once, above its highest mark and interval."""
    highest: dict[str, tuple[float, float]] = {}
    for point in (point for series in figure.series for point in series.points):
        top = point.y if point.high is None else point.high
        _, before = highest.get(point.label, (point.x, top))
        highest[point.label] = (point.x, max(top, before))
    for name, place in highest.items():
        axes.annotate(clean(name), place, xytext=(0, 4), textcoords="offset points", fontsize=8, ha="center")


def _bars(figure: Figure, axes: Axes) -> None:
    places = range(len(figure.categories))
    left = [0.0] * len(figure.categories)
    for series in figure.series:
        widths = [point.y for point in series.points]
        bars = axes.barh(
            places,
            widths,
            left=left if figure.kind == "stack" else None,
            height=0.6,
            color=COLOURS.get(series.tone, "#737985"),
        )
        bars.set_label(clean(series.name))
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(places, [clean(name) for name in figure.categories])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


@contextmanager
def _quiet_fonts() -> Iterator[None]:
    """matplotlib warns of every character that its font lacks; a box in a plot says so, too."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
            yield
    finally:
        logger.setLevel(before)
