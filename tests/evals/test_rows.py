"""What rows say of a score beside its figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evals.benchmark_data import write_gsm8k

from qwenq.evals.rows import _check_rows, point_of, rows_of
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


# Rows of the check that a quantised model's manifest holds.


def test_rows_of_a_check_are_those_of_the_manifest() -> None:
    check = {
        "kl": {"value": 0.1, "low": 0.08, "high": 0.12},
        "same_top": {"value": 0.8, "low": 0.7, "high": 0.9},
        "perplexity_ratio": {"value": None, "low": None, "high": None},
        "sequences": 8, "seq_len": 64, "tokens": 504, "dtype": "float32", "device": "cpu",
        "modules": [{"name": "model.layers.0.mlp.up_proj", "error": 0.01, "rtn_error": 0.02}],
        "kl_by_position": [
            {"first": 1, "last": 32, "n": 256, "value": 0.15, "low": 0.1, "high": 0.2},
            {"first": 33, "last": 63, "n": 248, "value": 0.05, "low": None, "high": None},
        ],
    }  # fmt: skip
    calibration = {"source": "self", "tokens": "abc"}
    manifest = {"check": check, "calibration": calibration, "made_by": "qwenq 1", "recipe": {}}
    kl, same, ratio = _check_rows(manifest, Model("m", "f", "int4", "m"), "m-int4")
    assert (kl.metric, kl.value, kl.low, kl.high, kl.n) == ("kl", 0.1, 0.08, 0.12, 504)
    assert same.details == {"command": "qwenq quantize --out m-int4"}
    assert kl.details == {
        "command": "qwenq quantize --out m-int4",
        "modules": check["modules"],
        "positions": [16.5, 48.0], "values": [0.15, 0.05], "counts": [256, 248],
        "lows": [0.1, None], "highs": [0.2, None],
    }  # fmt: skip
    experts = {"model.layers.0.mlp.experts": [3, 0]}
    row, *_ = _check_rows(manifest | {"expert_tokens": experts}, Model("m", "f", "int4", "m"), "m-int4")
    assert row.details["expert_tokens"] == experts
    assert (same.metric, same.value) == ("same_top", 0.8)
    assert (ratio.metric, ratio.status, ratio.reason) == ("perplexity.ratio", "failed", "not finite")
