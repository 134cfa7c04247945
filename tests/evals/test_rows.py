"""What rows say of a score beside its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evals.benchmark_data import write_gsm8k

from qwenq.evals.rows import point_of, rows_of
from qwenq.evals.run import Answers, TaskPlan, make_plan
from qwenq.evals.task import DataSource, Item, Judgement
from qwenq.evals.tasks.registry import get_task
from qwenq.results import Model

BOOTSTRAP = "bootstrap within subjects, 10000 resamples"


class Named:
    """As much of a model as rows ask for."""

    model = Model("m", "sha256:x", "fp32", "m")
    base = None


@pytest.mark.parametrize(
    ("task", "law", "logic", "interval"),
    [
        ("ceval", "101", "01", BOOTSTRAP),
        ("ceval", "111", "11", "Wilson"),
        ("ceval", "000", "11", "Wilson"),
        ("ceval", "101", "1", None),
        ("mmlu", "101", "1", "Wilson"),
        ("mmlu", "1", "", "Wilson"),
    ],
)
def test_rows_name_the_interval_method(task: str, law: str, logic: str, interval: str | None) -> None:
    """Where the items of every subject agree, a bootstrap sees no spread and Wilson's is taken."""
    judged = [
        (Item(f"{subject}/{n}", subject, {}), Judgement(verdict == "1", ""))
        for subject, verdicts in (("law", law), ("logic", logic))
        for n, verdict in enumerate(verdicts)
    ]
    eval_model: Any = Named()
    plan = TaskPlan(get_task(task, "card"), [item for item, _ in judged])
    (row,) = rows_of(eval_model, plan, Answers(judged, ("here",), 0), None, {})
    assert row.settings.get("interval") == interval
    assert (row.low is None) == (interval is None)
    assert ("seed" in row.settings) == (interval == BOOTSTRAP)


def test_a_limit_above_the_items_is_none(tmp_path: Path) -> None:
    """The same items as without it, so the same point: rows of both are compared."""
    source, task = DataSource(write_gsm8k(tmp_path)), get_task("gsm8k", "card")
    limits = [point_of(make_plan(task, source, (), None, limit))["limit"] for limit in (1318, 1319, 2000)]
    assert limits == [1318, None, None]
