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

from qwenq.reporting.collect import collect
from qwenq.reporting.report import make_report
from qwenq.reporting.write import report_markdown
from qwenq.results import read_environment, read_rows
from qwenq.storage import sha256_file

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
    found = read_environment(Path("runs/Tiny"))
    assert found["versions"]["torch"]
    assert rows[0].settings["machine"]["cpu"] == found["cpu"]


def test_a_second_run_is_answered_from_records(evaluate: Shell, base: Path, data: Path) -> None:
    first = scores(evaluate(base, *options(data, 6, "--json")))
    again = evaluate(base, *options(data, 6, "--json"))
    assert scores(again) == first
    assert "12 answered earlier" in again.err


def quantise(folder: Path, base: Path, noise: float) -> Path:
    from evals.test_check import write_quantised

    from qwenq.models.gptq_config import QuantConfig

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
    assert f"fp32: {paired['sentence']}" in ran.out
    assert "paired" not in rows["fp32", "accuracy"].details


def test_a_base_asked_otherwise_is_said(evaluate: Shell, base: Path, data: Path, tmp_path: Path) -> None:
    int8 = quantise(tmp_path / "Tiny-GPTQ-Int8", base, noise=0.5)
    evaluate(base, *options(data, 6), "--out", "run")
    assert (
        "its base was evaluated with another limit" in evaluate(int8, *options(data, 3), "--out", "run").out
    )
    again = evaluate(int8, *options(data, 6), "--out", "run", "--shots", "5")  # the protocol's own number
    assert "lost / won" in again.out


def write_manifest(folder: Path, **changed: Any) -> None:
    """As `qwenq quantize` leaves it, with what it measured on held-out text."""
    check = {
        "kl": {"value": 0.0712, "low": 0.06, "high": 0.08},
        "same_top": {"value": 0.9, "low": 0.85, "high": 0.95},
        "perplexity_ratio": {"value": 1.05, "low": None, "high": None},
        "sequences": 8, "seq_len": 64, "tokens": 504, "dtype": "float32", "device": "cpu", "modules": [],
    }  # fmt: skip
    manifest = {
        "made_by": "qwenq 0.1.0",
        "recipe": {},
        "calibration": {"source": "self", "tokens": "abc"},
        "check": check,
        "files": {file.name: {"sha256": sha256_file(file)} for file in sorted(folder.iterdir())},
        **changed,
    }
    (folder / "qwenq.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_base_that_has_changed_since_is_no_base(
    evaluate: Shell, base: Path, data: Path, tmp_path: Path
) -> None:
    """Its family and precision are the same; neither in one command nor from the folder's rows."""
    int8 = quantise(tmp_path / "Tiny-GPTQ-Int8", base, noise=0.5)
    write_manifest(int8, base={"model": str(base), "fingerprint": "of the weights before"})
    for models in ((base, int8), (int8,)):
        ran = evaluate(*models, *options(data), "--out", "run")
        assert ran.code == 0, ran.err
        assert "Tiny-GPTQ-Int8 was made from other weights than Tiny has: the base has changed" in ran.err
        assert "lost / won" not in ran.out
    assert not any("paired" in row.details for row in read_rows(Path("run")))


def test_a_foreign_manifest_is_a_line_and_no_traceback(
    evaluate: Shell, base: Path, data: Path, tmp_path: Path
) -> None:
    int8 = quantise(tmp_path / "Tiny-GPTQ-Int8", base, noise=0.5)
    write_manifest(int8, check={"made": "by another program"})
    ran = evaluate(base, int8, *options(data))
    assert ran.code == 0, ran.err
    assert "the check of Tiny-GPTQ-Int8 is not shown: its check is incomplete, or not as" in ran.err
    assert {row.metric for row in read_rows(Path("runs/Tiny"))} == {"accuracy", "accuracy.published"}


def test_what_quantising_cost_by_its_check_is_shown_and_recorded_once(
    evaluate: Shell, base: Path, data: Path, tmp_path: Path
) -> None:
    int8 = quantise(tmp_path / "Tiny-GPTQ-Int8", base, noise=0.5)
    write_manifest(int8)
    for _ in range(2):
        ran = evaluate(base, int8, *options(data), "--out", "run")
        assert ran.code == 0, ran.err
        assert (
            "Tiny-GPTQ-Int8 beside its base, by the check: "
            "KL divergence 0.0712 nats a token (0.0600 – 0.0800); same top token 90.0% (85.0% – 95.0%); "
            "perplexity × 1.050"
        ) in ran.out
    lines = Path("run/results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["metric"] for line in lines].count("kl") == 1
    (kl,) = (row for row in read_rows(Path("run")) if row.metric == "kl")
    assert (kl.value, kl.model.precision, kl.model.family) == (0.0712, "int8", "Tiny")
    report = report_markdown(make_report(collect([Path("run")]), "Tiny"))
    assert "| Int8 | 0.0712 (0.0600–0.0800) | 90.0 (85.0–95.0) |" in report


def test_a_check_of_other_bytes_is_not_shown(evaluate: Shell, base: Path, data: Path, tmp_path: Path) -> None:
    int8 = quantise(tmp_path / "Tiny-GPTQ-Int8", base, noise=0.5)
    write_manifest(int8)
    config = int8 / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    ran = evaluate(base, int8, *options(data))
    assert ran.code == 0, ran.err
    assert "the check of Tiny-GPTQ-Int8 is not shown: the bytes are not those that were written" in ran.err
    assert "KL divergence" not in ran.out
    assert {row.metric for row in read_rows(Path("runs/Tiny"))} == {"accuracy", "accuracy.published"}


def test_standard_errors_are_in_the_table(evaluate: Shell, base: Path, data: Path) -> None:
    ran = evaluate(base, *options(data))
    (row,) = (row for row in read_rows(Path("runs/Tiny")) if row.metric == "accuracy")
    assert row.details["standard_error"] == pytest.approx((row.value * (1 - row.value) / 12) ** 0.5)
    header, line = ran.out.splitlines()[:2]
    assert "± SE" in header
    shown = f"{row.value:.1%} ± {100 * row.details['standard_error']:.1f} {row.low:.1%} – {row.high:.1%} 12"
    assert shown in " ".join(line.split())


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
    elsewhere = evaluate(base, "--data", ".", "--show", "astronomy/2")
    assert "(prompt not shown: no mmlu data there; name the data of this run: --data DIR or" in elsewhere.out
    missing = evaluate(base, "--data", data, "--show", "astronomy/700")
    assert missing.code == 2
    assert "no record" in missing.err


def test_one_item_of_the_sample_suite_needs_no_word_about_its_data(evaluate: Shell, base: Path) -> None:
    how = ("--tasks", "mmlu", "--protocol", "base", "--dtype", "float32", "--device", "cpu")
    assert evaluate(base, "--sample", "--limit", 2, *how).code == 0
    shown = evaluate(base, "--show", "everyday_things/1").out
    assert "prompt not shown" not in shown
    assert "about everyday things" in shown


def test_answers_cannot_steer_the_terminal(evaluate: Shell, base: Path, data: Path) -> None:
    evaluate(base, *options(data))
    (file,) = Path("runs/Tiny/records").glob("*.jsonl")
    record = json.loads(file.read_text().splitlines()[1])
    hostile = {**record, "output": "\x1b[2J\x07\u202egone", "extracted": "\x9b31m"}
    with file.open("a") as opened:
        opened.write(json.dumps(hostile) + "\n")
    shown = evaluate(base, "--data", data, "--show", record["id"]).out
    assert "\ufffd[2J\ufffd\ufffdgone" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "mmmlu"], "did you mean mmlu"),
        (["--tasks", ","], "no name given"),
        (["--batch", "many"], "--batch"),
        (["--batch", "0"], "--batch"),
        (["--batch", "9" * 5000], "--batch"),
        (["--data", "nowhere"], "no such folder"),
        (["--data", ".", "--sample"], "exclude each other"),
        (["--tasks", "mmlu", "--data", "."], "no mmlu data there"),
        (["--device", "cuda:99"], "cuda:99 cannot be used"),
        (["--out", "o\udcff"], "the name of --out is not UTF-8"),
        (["--data", "d\udcff"], "the name of --data is not UTF-8"),
        (["--data", "d" * 300], "--data cannot be looked for: File name too long"),
        (["--show", "x", "--out", "d" * 300], "--out cannot be looked for: File name too long"),
    ],
)
def test_bad_input_is_explained(arguments: list[str], said: str, evaluate: Shell, base: Path) -> None:
    ran = evaluate(base, *arguments)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not Path("runs/Tiny/results.jsonl").exists()


@pytest.mark.parametrize(
    "option", ["--dtype=bfloat16", "--device=cpu", "--kernel=x", "--dtype=auto", "--attention=auto"]
)
def test_how_a_server_runs_its_model_is_not_decided_here(option: str, evaluate: Shell) -> None:
    ran = evaluate("--endpoint", "http://127.0.0.1:9/v1", option)
    assert ran.code == 2
    assert "the server decides how it runs its model" in ran.err
    assert option.partition("=")[0] in ran.err


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
    assert "answered earlier" in last.err


def lines(run: Path) -> int:
    """Records so far."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in (run / "records").glob("*.jsonl"))
