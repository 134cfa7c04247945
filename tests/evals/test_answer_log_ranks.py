"""Items dealt out to several processes, and their records made one again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.distributed import ALONE, Team
from qwenq.errors import StorageError
from qwenq.evals.answer_log import (
    AnswerLog,
    AnswerRecord,
    cost,
    merge_rank_logs,
    rank_title,
    require_none_missing,
    split_by_cost,
)
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
        with AnswerLog(tmp_path, rank_title("a.b", Team(rank, 12)), KEY) as part:
            part.append(AnswerRecord(f"item{rank}", None, "asked", 0))
            part.append(AnswerRecord("known", None, "asked", 0))
    with (
        AnswerLog(tmp_path, rank_title("a.c", Team(1, 2)), KEY) as other,
        AnswerLog(tmp_path, "a.b", KEY) as whole,
    ):
        other.append(AnswerRecord("of another model", None, "asked", 0))
        whole.append(AnswerRecord("known", None, "asked", 0, note="first"))
        assert {record.id for record in merge_rank_logs(whole, tmp_path, "a.b", KEY)} == {
            "item1",
            "item2",
            "item11",
        }
        assert whole.find("known", "asked") == AnswerRecord("known", None, "asked", 0, note="first")
        assert merge_rank_logs(whole, tmp_path, "a.b", KEY) == []
        assert merge_rank_logs(whole, tmp_path, "a.b", {"model": "other"}) == []
    assert len(list((tmp_path / "records").iterdir())) == 2, "the parts are gone, the other model's is not"


def test_a_run_folder_that_ranks_do_not_share_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="3 answers of other processes are missing"):
        require_none_missing(3, Team(0, 2), tmp_path)
    require_none_missing(0, Team(0, 2), tmp_path)
    require_none_missing(3, ALONE, tmp_path)
