"""``qwenq eval`` as a user runs it, on a tiny model and benchmarks of our own in the original layouts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_shell import Ran, Shell
from evals.benchmark_data import write_mmlu
from tiny_model import write_tiny_model

from qwenq.results import read_environment, read_rows

SUBJECTS = "abstract_algebra,astronomy"


@pytest.fixture(autouse=True)
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return Shell("eval", monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "Tiny", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mmlu(tmp_path_factory.mktemp("data"))


def options(data: Path, limit: int = 6, *more: str) -> list[object]:
    common = ["--tasks", "mmlu", "--protocol", "base", "--subjects", SUBJECTS, "--data", data]
    return [*common, "--limit", limit, "--dtype", "float32", "--device", "cpu", *more]


def scores(ran: Ran) -> list[tuple[Any, ...]]:
    assert ran.code == 0, ran.err
    return [(r["model"]["precision"], r["metric"], r["value"], r["n"]) for r in json.loads(ran.out)["rows"]]


def test_table_rows_and_environment(evaluate: Shell, base: Path, data: Path) -> None:
    ran = evaluate(base, *options(data))
    assert ran.code == 0, ran.err
    assert "mmlu (published)" in ran.out
    assert "Tiny fp32" in ran.out
    assert "first 6 items" in ran.out
    assert "12 of 12" in ran.err
    rows = read_rows(Path("runs/Tiny"))
    assert [row.metric for row in rows] == ["accuracy", "accuracy.published"]
    assert rows[0].details["command"].startswith("qwenq eval ")
    assert read_environment(Path("runs/Tiny"))["versions"]["torch"]


def test_a_second_run_is_answered_from_records(evaluate: Shell, base: Path, data: Path) -> None:
    first = scores(evaluate(base, *options(data, 6, "--json")))
    again = evaluate(base, *options(data, 6, "--json"))
    assert scores(again) == first
    assert "12 known from records" in again.err


def quantise(folder: Path, base: Path, noise: float) -> Path:
    from evals.test_check import write_quantised

    from qwenq.models.gptq_format import QuantConfig

    write_quantised(folder, base, QuantConfig(bits=8, group_size=16), noise=noise)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def test_quantised_models_are_compared_with_their_base(
    evaluate: Shell, base: Path, data: Path, tmp_path: Path
) -> None:
    int8 = quantise(tmp_path / "other-name", base, noise=0.5)
    ran = evaluate(int8, base, *options(data, 50))  # the base comes first, whatever the order
    assert ran.code == 0, ran.err
    assert "nothing says what other-name was made from: it is compared with Tiny" in ran.err
    assert "lost / won" in ran.out
    rows = {(row.model.precision, row.metric): row for row in read_rows(Path("runs/other-name"))}
    paired = rows["int8", "accuracy"].details["paired"]
    assert paired["n"] == 100
    assert paired["sentence"] in ran.out
    assert "paired" not in rows["fp32", "accuracy"].details


def test_one_item_in_full(evaluate: Shell, base: Path, data: Path) -> None:
    evaluate(base, *options(data))
    shown = evaluate(base, "--data", data, "--show", "astronomy/2")
    assert shown.code == 0, shown.err
    for text in (
        "about astronomy",
        "--- right answer\nC",
        "--- log-probabilities",
        "[' A', ' B', ' C', ' D']",
    ):
        assert text in shown.out
    missing = evaluate(base, "--data", data, "--show", "astronomy/700")
    assert missing.code == 2
    assert "no record" in missing.err


def test_answers_cannot_steer_the_terminal(evaluate: Shell, base: Path, data: Path) -> None:
    evaluate(base, *options(data))
    (file,) = Path("runs/Tiny/records").glob("*.jsonl")
    record = json.loads(file.read_text().splitlines()[1])
    hostile = {**record, "output": "\x1b[2J\x07\u202egone", "extracted": "\x9b31m"}
    with file.open("a") as opened:
        opened.write(json.dumps(hostile) + "\n")
    shown = evaluate(base, "--data", data, "--show", record["id"]).out
    assert "\\x1b[2J\\x07\\u202egone" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "mmmlu"], "did you mean mmlu"),
        (["--tasks", ","], "no name given"),
        (["--batch", "many"], "--batch"),
        (["--batch", "0"], "--batch"),
        (["--data", "nowhere"], "no such folder"),
        (["--data", ".", "--sample"], "exclude each other"),
        (["--tasks", "mmlu", "--data", "."], "no mmlu data there"),
        (["--device", "cuda:99"], "cuda:99 cannot be used"),
    ],
)
def test_bad_input_is_explained(arguments: list[str], said: str, evaluate: Shell, base: Path) -> None:
    ran = evaluate(base, *arguments)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not Path("runs/Tiny/results.jsonl").exists()


def test_random_weights_have_no_accuracy(evaluate: Shell, base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "random"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"qwenq_random_weights": {"seed": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = evaluate(folder, *options(data))
    assert ran.code == 2
    assert "random weights" in ran.err


@pytest.mark.slow
def test_after_kill_9_the_same_command_ends_with_the_same_scores(
    evaluate: Shell, base: Path, data: Path, tmp_path: Path
) -> None:
    wanted = scores(evaluate(base, *options(data, 100, "--json"), "--out", tmp_path / "whole"))
    out = tmp_path / "killed"
    arguments = [*options(data, 100, "--json", "--batch", "1"), "--out", out]
    command = [sys.executable, "-m", "qwenq", "eval", str(base), *map(str, arguments)]
    kills = 0
    for least in (20, 90):
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        while child.poll() is None and lines(out) < least:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    known = lines(out)
    assert kills == 2
    assert 90 <= known < 200
    last = evaluate(base, *arguments)
    assert scores(last) == wanted
    assert "known from records" in last.err


def lines(run: Path) -> int:
    """Records so far."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in (run / "records").glob("*.jsonl"))
