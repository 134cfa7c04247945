"""``qwenq run`` from beginning to end on a tiny model: every step, then none of them again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_chain import write_chain

from qwenq.results import read_rows

GATE = """title = "A tiny model"
[gate]
baseline = "baseline"
fail_on = "accuracy:significant, kl:>0.05, size:>1.0"
"""


def qwenq(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", *arguments]
    known = {**os.environ, "QWENQ_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some ten processes, each of which imports torch
def test_the_whole_chain_and_then_nothing_twice(tmp_path: Path) -> None:
    write_chain(tmp_path, limit=3, attention='["sdpa", "v2"]', more=GATE)
    (tmp_path / "baseline").mkdir()

    first = qwenq(tmp_path, "run", "recipe.toml")
    assert first.returncode == 2, first.stderr  # there is no baseline yet: said by the gate, as misuse
    run = tmp_path / "runs" / "tiny"
    shutil.copy(run / "results.jsonl", tmp_path / "baseline")
    shutil.copy(run / "environment.json", tmp_path / "baseline")

    rows = read_rows(run)
    done = {(row.metric, row.model.precision) for row in rows if row.status == "ok"}
    assert {("accuracy", "fp32"), ("accuracy", "int4"), ("kl", "int4"), ("speed.decode", "int4")} <= done
    assert any(row.status == "unavailable" and row.point.get("attention") == "v2" for row in rows)
    assert len({row.model.family for row in rows}) == 1
    assert len({row.model.fingerprint for row in rows if row.model.precision == "int4"}) == 1

    journal = (run / "journal.jsonl").read_bytes()
    second = qwenq(tmp_path, "run", "recipe.toml")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Passed: no condition failed" in second.stdout
    assert second.stdout.splitlines()[-1] == "reports/tiny/index.html"
    steps = [
        json.loads(line)["step"] for line in (run / "journal.jsonl").read_bytes()[len(journal) :].splitlines()
    ]
    assert steps == ["gate"]
    text = (tmp_path / "reports/tiny/README.md").read_text()
    assert text.startswith("# A tiny model\n")
    for heading in (
        "| Quantization | MMLU (%) |",
        "| Quantization | Attention | Speed, 8 tokens (tokens/s) |",
        "KL divergence",
    ):
        assert heading in text


def test_baseline_conditions_and_folder_of_the_report_can_be_given(tmp_path: Path) -> None:
    write_chain(tmp_path, limit=3)
    options = ["--baseline", "before", "--fail-on", "kl:>0.1", "--reports", "elsewhere"]
    shown = qwenq(tmp_path, "run", "recipe.toml", "--out", "out", *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    verdict = "--markdown out/gate.md --junit out/gate.xml"
    assert f"qwenq compare before out --fail-on 'kl:>0.1' {verdict}" in shown.stderr
    assert "report out --out elsewhere/tiny\n" in shown.stderr
    wrong = qwenq(tmp_path, "run", "recipe.toml", "--fail-on", "sped:<0.9", "--dry-run")
    assert wrong.returncode == 2
    assert "unknown metric 'sped'" in wrong.stderr
