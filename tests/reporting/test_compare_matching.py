"""Which row stands against which: no row of another model is taken for the one that is meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_runs import speed, write_run

from qwenq.reporting.collect import collect
from qwenq.reporting.compare import Comparison, compare
from qwenq.reporting.gate import judge, parse
from qwenq.results import Row

Compare = Callable[[list[Row], list[Row]], list[Comparison]]


@pytest.fixture
def compared(tmp_path: Path) -> Compare:
    def run(old: list[Row], new: list[Row]) -> list[Comparison]:
        number = len(list(tmp_path.iterdir()))
        before = collect([write_run(tmp_path / f"old{number}", old)])
        return compare(before, collect([write_run(tmp_path / f"new{number}", new)]))

    return run


def decode(fingerprint: str, factor: float = 1.0, **changes: Any) -> Row:
    row = next(row for row in speed("int4", 2048, factor=factor) if row.metric == "speed.decode")
    return replace(row, model=replace(row.model, fingerprint=fingerprint, nbytes=None, **changes))


def test_a_model_quantised_anew_is_not_passed_by_the_rows_of_the_one_before(compared: Compare) -> None:
    """The run went on in its folder: the baseline's own rows are there still, and equal to themselves."""
    found = compared([decode("a")], [decode("a"), decode("b", 0.5)])
    assert [item.comparable for item in found] == [False]
    assert (
        found[0].why == "2 models of the new run could be the same model: start each run in an empty folder"
    )
    assert judge(found, parse("speed:<0.95")).exit_code == 3


def test_models_that_both_runs_have_are_each_their_own(compared: Compare) -> None:
    found = compared([decode("a"), decode("b", 0.5)], [decode("b", 0.5), decode("a")])
    assert [item.change for item in found] == [1.0, 1.0]


def test_others_of_another_name_or_group_size_are_new(compared: Compare) -> None:
    for other in (decode("b", 0.5, group_size=32), decode("b", 0.5, name="another")):
        found = compared([decode("a")], [other, decode("a")])
        assert [(item.change, item.before is None) for item in found] == [(1.0, False), (None, True)]


@pytest.mark.parametrize("left", ["a", "c"])
def test_one_model_is_no_match_of_two(compared: Compare, left: str) -> None:
    """The baseline has groups of 128 and of 64, the new run has the first alone, perhaps quantised anew."""
    old = [decode("a", group_size=128), decode("b", group_size=64)]
    found = compared(old, [decode(left, group_size=128)])
    assert [item.comparable for item in found] == [True, False]
    assert found[1].why == "missing in the new run, which has one of 2 such models"
    assert judge(found, parse("speed:<0.95")).exit_code == 3


def test_of_two_that_nothing_tells_apart_none_is_taken(compared: Compare) -> None:
    found = compared([decode("a"), decode("b")], [decode("c")])
    assert [item.why for item in found] == [
        "2 models of the baseline could be the same model: start each run in an empty folder"
    ] * 2
