"""Holm against hand-worked examples, and which rows can be paired."""

from __future__ import annotations

from dataclasses import replace

import pytest
from example_runs import accuracy
from hypothesis import given
from hypothesis import strategies as st

from qwenq.comparison import Paired, other_items, paired
from qwenq.statistics import holm


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))
    assert all(
        after <= min(1.0, before * len(p_values)) + 1e-12
        for before, after in zip(p_values, adjusted, strict=True)
    )


def test_pairing_counts_items_by_id() -> None:
    before, after = accuracy("fp32", n=100), accuracy("int4", n=100, flips=7)
    assert paired(before, after) == Paired(100, 7, 0)
    assert paired(after, before) == Paired(100, 0, 7)
    shuffled = replace(after, details={"items": dict(reversed(after.details["items"].items()))})
    assert paired(before, shuffled) == paired(before, after)


@pytest.mark.parametrize("items", [None, {}, [], {"mmlu/0": "yes"}, {"mmlu/0": 1}])
def test_no_sound_record_no_pairing(items: object) -> None:
    broken = replace(accuracy("int4", n=10), details={"items": items})
    assert paired(accuracy("fp32", n=10), broken) == "no record of single items"


def test_other_items_are_not_paired() -> None:
    message = paired(accuracy("fp32", n=10), accuracy("int4", n=12))
    assert message == "other items: 2 of 12 are in one of the two only"


def test_other_questions_under_the_same_ids_are_not_paired() -> None:
    before, after = (
        replace(row, details={**row.details, "questions": asked})
        for row, asked in ((accuracy("fp32", n=10), "a1"), (accuracy("int4", n=10), "b2"))
    )
    assert paired(before, after) == "other questions under the same ids: the data has changed"
    assert other_items(before, after)
    unknown = replace(after, details={**after.details, "questions": None})  # of an older record
    assert isinstance(paired(before, unknown), Paired)
