"""Items dealt out to several processes, and their records made one again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import StorageError
from qwenq.evals.answer_log import AnswerLog, AnswerRecord, cost, split_by_cost
from qwenq.evals.run import _all
from qwenq.evals.task import Choose, Write

KEY = {"model": "m", "task": "t"}


@given(costs=st.lists(st.integers(1, 1000), max_size=60), ranks=st.integers(1, 8))
def test_every_item_goes_to_one_rank_and_none_gets_much_more(costs: list[int], ranks: int) -> None:
    shares = split_by_cost(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_generation_costs_more_than_scoring() -> None:
    assert cost(Write("x" * 400, 100)) > cost(Choose("x" * 400, ("A", "B", "C", "D"))) > 100
    assert cost(Choose(({"role": "user", "content": "x" * 400},), ("A",))) > 100


def test_records_of_other_ranks_are_taken_over_once(tmp_path: Path) -> None:
    for rank in (1, 2, 11):
        with AnswerLog(tmp_path, "a.b", KEY, rank) as part:
            part.append(AnswerRecord(f"item{rank}", None, "asked", 0))
            part.append(AnswerRecord("known", None, "asked", 0))
    with (
        AnswerLog(tmp_path, "a.c", KEY, 1) as other,
        AnswerLog(tmp_path, "a.b", KEY) as whole,
        AnswerLog(tmp_path, "a.b", {"model": "other"}) as another,
    ):
        other.append(AnswerRecord("of another model", None, "asked", 0))
        whole.append(AnswerRecord("known", None, "asked", 0, note="first"))
        assert another.merge_ranks() == []
        assert {record.id for record in whole.merge_ranks()} == {"item1", "item2", "item11"}
        assert whole.find("known", "asked") == AnswerRecord("known", None, "asked", 0, note="first")
        assert whole.merge_ranks() == []
    assert len(list((tmp_path / "records").iterdir())) == 3, "the parts are gone, other models' are not"


def test_a_run_folder_that_ranks_do_not_share_is_an_error(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "a.b", KEY) as log:
        log.append(AnswerRecord("mine", None, "asked", 0))
        asked = dict.fromkeys(("mine", "yours", "theirs", "hers"), "asked")
        with pytest.raises(StorageError, match="3 answers of other processes are missing"):
            _all(log, asked, tmp_path)
