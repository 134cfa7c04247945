"""``qwenq eval --limit``: of every task, or of each its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_shell import Shell
from tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return Shell("eval", monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "Tiny", max_position_embeddings=2048)


def test_each_task_can_have_a_limit_of_its_own(evaluate: Shell, base: Path, tmp_path: Path) -> None:
    how = ("--sample", "--protocol", "base", "--dtype", "float32", "--device", "cpu", "--json")
    ran = evaluate(base, "--tasks", "mmlu,ceval", "--limit", "mmlu=1", *how)
    found = {(row["point"]["task"], row["point"]["limit"]) for row in json.loads(ran.out)["rows"]}
    assert found == {("mmlu", 1), ("ceval", None)}
    n = {row["point"]["task"]: row["n"] for row in json.loads(ran.out)["rows"]}
    assert 0 < n["mmlu"] < n["ceval"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "0"], "eval.limit = 0: Input should be greater than or equal to 1"),
        (["--limit", "-1"], "eval.limit = -1: Input should be greater"),
        (["--limit", "9" * 5000], "eval.limit = "),
        (["--limit", "2,3"], "eval.limit = '2,3'"),
        (["--limit", "mmlu=2,3"], "'3' is not NAME=NUMBER"),
        (["--limit", "mmlu="], "eval.limit.mmlu = ''"),
        (["--limit", "=2"], "'=2' is not NAME=NUMBER"),
        (["--limit", "mmlu=2,mmlu=3"], "mmlu is given twice"),
        (["--tasks", "mmlu,ceval", "--limit", "gsm8k=2"], "'gsm8k' is not among the tasks"),
    ],
)
def test_what_is_no_limit_is_explained(arguments: list[str], said: str, evaluate: Shell, base: Path) -> None:
    ran = evaluate(base, *arguments)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err
