"""Which unquantised model a quantised one is compared with: by one rule, and evals and reports obey it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenq.comparison import PLAIN, choose_base
from qwenq.evals.rows import base_row, point_of
from qwenq.reporting.collect import collect
from qwenq.reporting.losses import losses
from qwenq.results import Model, Row, append_row


@pytest.mark.parametrize(
    ("measured", "dtype", "chosen"),
    [
        ("fp32 bf16 fp16 int8", "bfloat16", "bf16"),
        ("fp32 bf16 fp16 int8", "float16", "fp16"),
        ("fp32 bf16 fp16 int8", None, "fp32"),
        ("bf16 fp16", "float32", "bf16"),
        ("fp16 fp32", "bfloat16", "fp32"),
        ("int8 served", "bfloat16", None),
        ("bf16", ["bfloat16"], "bf16"),
    ],
)
def test_the_base_is_computed_alike_where_there_is_one(
    measured: str, dtype: object, chosen: str | None
) -> None:
    assert choose_base({precision: precision for precision in measured.split()}, dtype) == chosen


def plan_of(task: str) -> Any:
    return SimpleNamespace(
        task=SimpleNamespace(name=task, protocol="card", version=1),
        limit=None,
        shots=None,
        subjects=(),
        source=SimpleNamespace(sample=False),
        thinking=False,
        max_new_tokens=None,
    )


def row(precision: str, dtype: str) -> Row:
    model = Model("m", "sha256:quantised" if precision == "int4" else "sha256:plain", precision, "m")
    point = point_of(plan_of("mmlu"))
    return Row(
        "accuracy", model, point, 0.5, "share", settings={"dtype": dtype}, details={"items": {"a": True}}
    )


SETS = [chosen for size in range(len(PLAIN) + 1) for chosen in combinations(PLAIN, size)]


@pytest.mark.parametrize("dtype", PLAIN.values())
@pytest.mark.parametrize("measured", SETS, ids="+".join)
def test_evaluation_and_reports_choose_the_same_base(
    tmp_path: Path, measured: tuple[str, ...], dtype: str
) -> None:
    """Whatever was measured at this point; a row of another task is no base."""
    for precision in measured:
        append_row(tmp_path, row(precision, PLAIN[precision]))
    quantised = row("int4", dtype)
    contender: Any = SimpleNamespace(
        quantised=True, model=quantised.model, how=SimpleNamespace(dtype=dtype), base="sha256:plain"
    )
    append_row(tmp_path, quantised)
    evaluated = base_row(tmp_path, contender, plan_of("mmlu"))
    assert base_row(tmp_path, contender, plan_of("gsm8k")) is None
    reported = [loss.before.model.precision for loss in losses(collect([tmp_path]), "m")]
    expected = choose_base({precision: precision for precision in measured}, dtype)
    assert (evaluated.model.precision if evaluated else None) == expected
    assert reported == ([expected] if expected else [])
