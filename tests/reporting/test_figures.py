"""The trade-off frontier: which models no other beats, and that page and plots join no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from example_runs import accuracy, model, speed, write_run
from hypothesis import given
from hypothesis import strategies as st

from qwenq.reporting.collect import collect
from qwenq.reporting.figures import Figure, Point, Series, figures_of, frontier
from qwenq.reporting.plots import inline_svg, write_plot
from qwenq.results import Row


def names(points: tuple[Point, ...]) -> str:
    return "".join(point.label for point in points if not point.beaten)


@pytest.mark.parametrize(("places", "less", "best"), [
    ({"a": (1, 1), "b": (2, 2), "c": (3, 3)}, True, "abc"),  # each larger one is better at something
    ({"a": (1, 1), "b": (2, 2), "c": (3, 3)}, False, "c"),
    ({"a": (1, 5), "b": (2, 4), "c": (3, 6), "d": (4, 6)}, True, "ac"),  # d is as good as c, and larger
    ({"a": (1, 5), "b": (2, 4), "c": (3, 6), "d": (4, 6)}, False, "d"),
    ({"a": (1, 5), "b": (1, 4)}, True, "a"),  # of one size the better one
    ({"a": (1, 5), "b": (1, 5)}, True, "ab"),  # at one place neither beats the other
    ({"c": (3, 1), "a": (1, 3), "b": (2, 2)}, False, "abc"),
])  # fmt: skip
def test_the_set_that_no_other_beats(places: dict[str, tuple[float, float]], less: bool, best: str) -> None:
    points = [Point(x, y, name) for name, (x, y) in places.items()]
    assert names(frontier(points, less=less)) == best


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=9), st.booleans())
def test_what_is_left_out_is_beaten_by_what_is_joined(places: list[tuple[int, int]], less: bool) -> None:
    """And along the frontier whoever pays more on x gets more y: the line never goes back."""
    points = frontier([Point(x, y) for x, y in places], less=less)
    assert sorted((point.x, point.y) for point in points) == sorted(places)
    best = [point for point in points if not point.beaten]
    assert bool(best) == bool(points)
    sign = -1 if less else 1
    for point in points:
        above = [
            other for other in best
            if sign * other.x >= sign * point.x and other.y >= point.y and other != point
            and (other.x, other.y) != (point.x, point.y)
        ]  # fmt: skip
        assert point.beaten == bool(above)
    ordered = sorted({(point.x, point.y) for point in best})
    assert [y for _, y in ordered] == sorted({y for _, y in ordered}, reverse=not less)


@pytest.fixture
def by_size(tmp_path: Path) -> Figure:
    """Int8 is as accurate as BF16, which is larger; Int4 is less accurate; FP32 is the largest."""
    flips = {"fp32": 0, "bf16": 9, "int8": 9, "int4": 40}
    made = [accuracy(precision, flips=count) for precision, count in flips.items()]
    collection = collect([write_run(tmp_path / "run", [*made, *speed("int4", 2048), *speed("fp32", 2048)])])
    return next(f for f in figures_of(collection, model("int4").family) if f.key == "accuracy_size")


def test_the_page_joins_the_frontier_and_marks_the_rest(by_size: Figure) -> None:
    (series,) = by_size.series
    assert [(point.label, point.beaten) for point in series.points] == [
        ("Int4", False), ("Int8", False), ("BF16", True), ("FP32", False),
    ]  # fmt: skip
    svg = str(inline_svg(by_size))
    (path,) = re.findall(r'<path fill="none" stroke="var\(--c0\)" stroke-linecap="square" d="([^"]*)"', svg)
    corners = set(re.findall(r"[ML] (\S+) (\S+)", path))
    circles = re.findall(r'<circle fill="([^"]*)"[^>]* cx="([^"]*)" cy="([^"]*)"', svg)
    assert sorted(fill for fill, *_ in circles) == ["var(--c0)"] * 3 + ["var(--paper)"]
    assert corners == {(x, y) for fill, x, y in circles if fill != "var(--paper)"}
    assert svg.count("another one is better on both axes") == 1
    assert "no other beats" in by_size.caption


def test_the_plots_join_the_frontier_and_mark_the_rest(by_size: Figure, tmp_path: Path) -> None:
    """The joined line has as many corners as the frontier; hollow dots are there as long as one is beaten."""
    png, svg = write_plot(by_size, tmp_path / "plot")
    assert png.stat().st_size > 1000
    text = svg.read_text(encoding="utf-8")
    colour = "#2566ad"
    (line,) = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {colour}; stroke-linecap', text)
    assert len(re.findall(r"[ML]", line)) == 3
    assert f"fill: #ffffff; stroke: {colour}" in text
    every = Figure(**{**vars(by_size), "series": (open_all(by_size.series[0]),)})
    _, other = write_plot(every, tmp_path / "every")
    assert f"fill: #ffffff; stroke: {colour}" not in other.read_text(encoding="utf-8")


def open_all(series: Series) -> Series:
    points = tuple(Point(p.x, p.y, p.label, p.low, p.high) for p in series.points)
    return Series(series.name, points, series.tone)


def test_the_size_that_was_chosen_is_marked_on_the_curve_of_all_sizes(tmp_path: Path) -> None:
    bits = {
        "tokens": 512,
        "bytes": 110e6,
        "remaining": 0.2,
        "curve": [[100e6, 0.4], [110e6, 0.2], [150e6, 0]],
    }
    row = Row(
        "kl",
        model("int4"),
        {"text": "held out"},
        0.1,
        "nats/token",
        details={"mixed_bits": bits},
        date="2026-01-02",
    )
    (figure,) = (
        one
        for one in figures_of(collect([write_run(tmp_path / "run", [row])]), row.model.family)
        if one.key == "bits"
    )
    curve, chosen = figure.series
    assert [(point.x, point.y) for point in curve.points] == [(100, 0.4), (110, 0.2), (150, 0)]
    assert (chosen.points[0].x, chosen.points[0].y) == (110, 0.2) and "512 calibration" in figure.caption


@pytest.mark.parametrize("curve", [None, [], [[1, 2]], [[1, "x"], [2, 3]], [[1], [2]], "no list"])
def test_a_curve_that_is_none_draws_nothing(tmp_path: Path, curve: object) -> None:
    details = {"mixed_bits": {"tokens": 1, "bytes": 2, "remaining": 3, "curve": curve}}
    row = Row(
        "kl", model("int4"), {"text": "held out"}, 0.1, "nats/token", details=details, date="2026-01-02"
    )
    found = figures_of(collect([write_run(tmp_path / "run", [row])]), row.model.family)
    assert "bits" not in {figure.key for figure in found}
