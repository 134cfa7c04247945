"""The printed table: columns vary, constants come once, missing figures have a reason."""

from __future__ import annotations

from dataclasses import replace

from qwenq.profiling.spec import Point
from qwenq.profiling.table import table
from qwenq.results import Row


def rows_of(point: Point) -> list[Row]:
    return [point.row(metric, 2.0, low=1.5, high=2.5, n=6) for metric in point.metrics]


def test_constants_are_listed_above_and_not_in_columns(points: list[Point]) -> None:
    printed = table([row for point in points[2:] for row in rows_of(point)])
    assert printed.headings[0] == "precision"
    assert dict(printed.constant)["workload"] == "generate 8"
    assert dict(printed.constant)["attention"] == "sdpa"
    assert [line[0] for line in printed.lines] == ["fp32", "int4"]
    assert "2.00 (1.50–2.50)" in printed.lines[0]


def test_an_interval_has_its_two_ends_as_it_need_not_be_symmetric(points: list[Point]) -> None:
    """Two values that differ give an interval of logarithms: nothing of it is below zero."""
    wide = points[0].row("speed.prefill", 187.47, low=39.42, high=878.45, n=2)
    assert "187.5 (39.4–878.5)" in table([wide]).lines[0]


def test_encoding_and_generating_share_a_table(points: list[Point]) -> None:
    printed = table([row for point in points for row in rows_of(point)])
    assert printed.headings[:2] == ("precision", "workload")
    prefill = printed.headings.index("prefill tok/s")
    assert [line[prefill] != "" for line in printed.lines] == [True, True, False, False]


def test_what_is_missing_says_why_once(points: list[Point]) -> None:
    broken = points[3].without("failed", "out of memory")
    printed = table([*rows_of(points[2]), *broken])
    assert "failed [1]" in printed.lines[1]
    assert printed.notes == ("[1] out of memory",)


def test_a_column_without_any_figure_is_a_note(points: list[Point]) -> None:
    rows = [row for row in rows_of(points[2]) if row.metric != "energy.token"]
    printed = table([*rows, *points[2].without("unavailable", "no counter", ["energy.token"])])
    assert "J/token" not in printed.headings
    assert printed.notes == ("[1] energy.token: no counter",)


def test_a_point_that_was_passed_over_says_so_once(points: list[Point]) -> None:
    """Whichever of its figures have a column: some here, none there."""
    late = points[2].without("unavailable", "the budget was over")
    printed = table([*rows_of(points[0]), *late])
    assert "- [1]" in printed.lines[1]
    assert printed.notes == table(late).notes == ("[1] the budget was over",)


def test_on_a_narrow_terminal_a_point_that_was_passed_over_is_one_remark(points: list[Point]) -> None:
    late = points[3].without("unavailable", "the budget was used up before", again=True)
    lines = table([*rows_of(points[2]), *late]).paragraphs(80)
    assert lines[-2:] == ["int4", "  not measured [1]"]


def test_another_attention_is_a_column(points: list[Point]) -> None:
    printed = table([*rows_of(points[2]), *rows_of(replace(points[2], attention="off"))])
    assert "attention" in printed.headings


def test_reasons_stand_in_the_order_of_the_figures_and_drive_no_terminal(points: list[Point]) -> None:
    """A run folder that is gone on with may be a stranger's."""
    rows = {row.metric: row for row in rows_of(points[2])}
    missing = ["memory.load", "speed.protocol", "energy.token", "time.first_token"]
    for metric in missing:
        (rows[metric],) = points[2].without("failed", f"\x1b[2J{metric}", [metric])
    notes = table(list(rows.values())).notes
    order = ["speed.protocol", "time.first_token", "memory.load", "energy.token"]
    assert notes == tuple(f"[{n}] {name}: \ufffd[2J{name}" for n, name in enumerate(order, 1))
