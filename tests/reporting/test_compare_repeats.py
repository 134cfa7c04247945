"""Repeated runs of the same code make one figure, as uncertain as they were apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import accuracy, speed, write_run

from qwenq.reporting import gate
from qwenq.reporting.collect import Collection, collect
from qwenq.reporting.compare import compare, idle_repeats, with_repeats
from qwenq.results import Row

Side = Callable[..., Collection]


def decode(value: float, half: float = 0.5, **changes: object) -> Row:
    row = next(row for row in speed("int4", 2048) if row.metric == "speed.decode")
    return replace(row, value=value, low=value - half, high=value + half, n=6, **changes)


@pytest.fixture
def side(tmp_path: Path) -> Side:
    """Runs of one row each, as one collection with turns."""
    number = 0

    def made(*rows: Row, **environment: object) -> Collection:
        nonlocal number
        folders = []
        for row in rows:
            number += 1
            folders.append(write_run(tmp_path / f"run{number}", [row], **environment))
        return with_repeats(collect(folders[:1]), collect(folders[1:]) if folders[1:] else None)

    return made


def outcome(before: Collection, after: Collection, conditions: str = "speed.decode:<0.9") -> str:
    (judged,) = [
        item
        for item in gate.judge(compare(before, after), gate.parse(conditions)).judged
        if item.comparison.row.metric == "speed.decode"
    ]
    return judged.outcome


def test_the_figure_is_the_median_and_its_interval_holds_all(side: Side) -> None:
    (item,) = side(decode(40.0), decode(20.0, 2.0), decode(30.0)).measured
    assert (item.row.value, item.row.low, item.row.high, item.row.n) == (30.0, 18.0, 40.5, 18)
    assert item.row.details["repeats"] == [40.0, 20.0, 30.0]


def test_a_machine_that_was_busy_for_one_turn_fails_nothing(side: Side) -> None:
    """One run each: a regression. In turns: the same code was as fast before, as often as not."""
    assert outcome(side(decode(40.0)), side(decode(30.0))) == "regression"
    before, after = [decode(40.0), decode(31.0), decode(40.5)], [decode(30.0), decode(39.5), decode(32.0)]
    assert outcome(side(*before), side(*after)) == "passed"


def test_what_is_slower_in_every_turn_fails(side: Side) -> None:
    before, after = [decode(40.0), decode(38.0), decode(41.0)], [decode(31.0), decode(30.0), decode(31.5)]
    assert outcome(side(*before), side(*after)) == "regression"


def test_figures_measured_once_get_an_interval_from_their_turns(side: Side) -> None:
    (item,) = side(*(replace(decode(value), low=None, high=None) for value in (40.0, 30.0))).measured
    assert (item.row.low, item.row.high) == (30.0, 40.0)


def test_turns_measured_once_each_are_enough_together(side: Side) -> None:
    """Two turns of one measurement are too few to judge, three are enough."""
    once = [replace(decode(value), low=None, high=None, n=1) for value in (40.0, 41.0, 39.0)]
    slow = [replace(decode(value), low=None, high=None, n=1) for value in (20.0, 21.0, 19.0)]
    assert outcome(side(*once[:2]), side(*slow[:2])) == "not judged"
    assert outcome(side(*once), side(*slow)) == "regression"


def test_other_weights_and_other_machines_are_no_turns(side: Side, tmp_path: Path) -> None:
    first = collect([write_run(tmp_path / "first", [decode(40.0)])])
    other_model = replace(decode(20.0).model, fingerprint="another")
    strangers = [
        collect([write_run(tmp_path / "weights", [decode(20.0, model=other_model)])]),
        collect([write_run(tmp_path / "machine", [decode(20.0)], cpu={"model": "another", "cores": 4})]),
        collect([write_run(tmp_path / "dtype", [decode(20.0, settings={"dtype": "bfloat16"})])]),
    ]
    for stranger in strangers:
        assert with_repeats(first, stranger).measured[0].row.value == 40.0


def test_what_the_machine_does_not_decide_is_that_of_the_first_run(tmp_path: Path) -> None:
    row = accuracy("int4", "mmlu")
    worse = replace(row, value=0.0, low=0.0, high=0.1)
    first, more = (collect([write_run(tmp_path / name, [r])]) for name, r in (("a", row), ("b", worse)))
    assert with_repeats(first, more).measured == first.measured


def test_a_turn_fills_in_what_the_first_run_could_not_measure(side: Side) -> None:
    late = replace(decode(1.0), value=None, low=None, high=None, n=None, status="unavailable", reason="late")
    (item,) = side(late, decode(30.0)).measured
    assert item.row.value == 30.0
    (item,) = side(late, late).measured
    assert item.row.status == "unavailable"


def test_a_turn_that_failed_has_failed_on_the_side_that_is_judged(tmp_path: Path) -> None:
    """It crashed in one run of two: that another run did not is no pass. A baseline's other turns count."""
    crash = replace(decode(1.0), value=None, low=None, high=None, n=None, status="failed", reason="killed")
    first, more = (
        collect([write_run(tmp_path / name, [row])]) for name, row in (("a", decode(40.0)), ("b", crash))
    )
    new = with_repeats(first, more, judged=True)
    found = gate.judge(compare(first, new), gate.parse("speed.decode:<0.9"))
    assert (found.exit_code, found.of("not comparable")[0].reason) == (3, "failed in the new run: killed")
    assert with_repeats(first, more).measured[0].row.value == 40.0


def test_further_runs_that_are_no_turns_are_named(tmp_path: Path) -> None:
    other = replace(decode(20.0).model, fingerprint="another")
    runs = {"first": decode(40.0), "turn": decode(39.0), "stranger": decode(20.0, model=other)}
    folders = [write_run(tmp_path / name, [row]) for name, row in runs.items()]
    assert idle_repeats(collect(folders[:1]), collect(folders[1:])) == ["stranger"]
    assert idle_repeats(collect(folders[:1]), None) == []
