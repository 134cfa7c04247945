"""Before any model is asked: the benchmark's own solutions have to pass, or no verdict means anything."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evals.benchmark_data import write_gsm8k, write_humaneval, write_mmlu
from evals.test_run import FLOAT32, Silent
from tiny_model import write_tiny_model

from qwenq.errors import DataError
from qwenq.evals.model import open_eval_model
from qwenq.evals.run import TaskPlan, make_plan
from qwenq.evals.sandbox.run import find_sandbox
from qwenq.evals.suite import check_solutions, evaluate
from qwenq.evals.task import DataSource, Item
from qwenq.evals.tasks.registry import get_task
from qwenq.recipe import EvalRecipe
from qwenq.results import Row

SANDBOX = find_sandbox(unsafe=True)  # the solutions are ours


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> TaskPlan:
    data = write_humaneval(tmp_path_factory.mktemp("data"))
    return make_plan(get_task("humaneval", "card"), DataSource(data), (), None, 4)


def check(plan: TaskPlan, run: Path) -> tuple[list[str], int]:
    """What was said, and how many programs ran."""
    said: list[str] = []
    listener = Silent(said)
    check_solutions(plan, SANDBOX, run, listener)
    return said, listener.programs


def changed(plan: TaskPlan, number: int, **data: str) -> TaskPlan:
    items = list(plan.items)
    item = items[number]
    found: Mapping[str, Any] = {**item.data, **data}
    items[number] = Item(item.id, item.subject, found)
    return replace(plan, items=items)


def test_solutions_that_pass_are_run_once_and_it_is_said_how_long_it_took(
    plan: TaskPlan, tmp_path: Path
) -> None:
    (said,), programs = check(plan, tmp_path)
    assert said.startswith("humaneval: all 4 of the benchmark's own solutions pass, in ")
    assert said.endswith(f" s; {SANDBOX.implementation}")
    (kept,) = (tmp_path / "records").glob("humaneval.solutions.*.json")
    assert json.loads(kept.read_text())["passed"] == programs == 4
    assert check(plan, tmp_path) == ([], 0)
    assert check(changed(plan, 1, canonical_solution="    return 1 + x\n"), tmp_path)[1] == 4, "other data"


def test_a_solution_that_fails_is_an_error_which_names_it(plan: TaskPlan, tmp_path: Path) -> None:
    broken = changed(plan, 2, canonical_solution="    return x\n")
    with pytest.raises(DataError, match="1 of 4 solutions of the benchmark itself fail") as caught:
        check(broken, tmp_path)
    assert caught.value.where == "HumanEval/2"
    assert not list((tmp_path / "records").glob("*.json")), "and it is tried again"


def test_a_benchmark_with_known_bad_solutions_says_which(plan: TaskPlan, tmp_path: Path) -> None:
    spared = replace(plan, task=replace(plan.task, spare=1))  # type: ignore[type-var]
    broken = changed(spared, 2, test="def check(candidate):\n    assert candidate(1) == 0\n")
    (which, passed), _ = check(broken, tmp_path)
    assert "so no answer can: HumanEval/2 (the first: " in which
    assert "humaneval: 3 of the benchmark's own solutions pass" in passed
    with pytest.raises(DataError, match="2 of 4"):
        check(changed(broken, 3, canonical_solution="    return x\n"), tmp_path)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return write_tiny_model(tmp_path / "Tiny", max_position_embeddings=2048)


def run(tiny: Path, folder: Path, wanted: EvalRecipe, batch: int | None = None) -> list[Row]:
    return evaluate([open_eval_model(str(tiny), FLOAT32)], wanted, folder, Silent(), batch=batch)


def test_rows_name_a_batch_where_all_was_asked_in_it(tiny: Path, tmp_path: Path) -> None:
    """Records do not say how many were asked together."""
    data = str(write_mmlu(tmp_path / "data"))
    wanted = EvalRecipe(("mmlu",), "base", ("astronomy",), limit=2, shots=0, data=data)
    batches = []
    for changed, batch in ((wanted, 2), (wanted, 1), (replace(wanted, limit=3), 1)):
        row, *_ = run(tiny, tmp_path / "run", changed, batch)
        batches.append(row.settings.get("batch"))
    assert batches == [2, None, None]
    row, *_ = run(tiny, tmp_path / "other", wanted)
    assert row.settings["batch"] == "auto"


def test_answers_cut_at_the_limit_are_reported(tiny: Path, tmp_path: Path) -> None:
    """What a model that thinks first would have come to, its score does not show."""
    data = str(write_gsm8k(tmp_path / "data"))
    wanted = EvalRecipe(("gsm8k",), "card", limit=3, data=data)
    run(tiny, tmp_path / "run", wanted)
    (file,) = (tmp_path / "run" / "records").glob("*.jsonl")
    lines = re.sub('"stopped": (true|false)', '"stopped": true', file.read_text(encoding="utf-8"))
    for cut in (0, 2):
        file.write_text(lines.replace('"stopped": true', '"stopped": false', cut), encoding="utf-8")
        said = list[str]()
        eval_model = open_eval_model(str(tiny), FLOAT32)
        (row,) = evaluate([eval_model], wanted, tmp_path / "run", Silent(said))
        line = "2 of 3 answers to gsm8k were cut at their limit of tokens, before they ended"
        assert said == ([f"Tiny fp32: {line}"] if cut else [])
        assert row.details.get("notes") == ([line] if cut else None)
