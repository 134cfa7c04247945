"""benchmarks/gpu.py without a GPU: a dry run goes through every step of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwenq.results import read_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
STEPS = ("checks", "card", "products", "batches", "quantising")


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no CUDA GPU here: nothing was measured" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_measures_every_step_and_is_not_repeated(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--dry-run", "--out", tmp_path, "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {step: json.loads((tmp_path / f"{step}.json").read_text()) for step in STEPS}
    assert all(each["complete"] for each in found.values()), found
    assert len(found["checks"]["checks"]) > 30
    assert all(check["passed"] for check in found["checks"]["checks"])
    kernels = {row["kernel"]: row for row in found["products"]["rows"]}
    assert set(kernels) == {"triton-int4", "triton-int8", "torch bf16", "torch int4pack"}
    assert "NotImplementedError" in kernels["torch int4pack"]["unavailable"]  # it has no product on a CPU
    assert [row["batch"] for row in found["batches"]["rows"]] == [1, 2]
    assert set(found["quantising"]["phases"]) >= {"forward", "hessian", "columns"}
    speeds = [row for row in read_rows(tmp_path / "card") if row.metric == "speed.protocol"]
    assert [row.status for row in speeds] == ["ok"]
    assert (tmp_path / "page" / "README.md").is_file()
    tables = (tmp_path / "gpu.md").read_text()
    assert "No number means anything" in tables and "unavailable: NotImplementedError" in tables

    again = run("--dry-run", "--out", tmp_path, "--minutes", "0")
    assert again.returncode == 0
    assert all(f"{step}: kept" in again.stdout for step in STEPS)


@pytest.mark.slow
def test_what_there_was_no_time_for_is_unavailable(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--dry-run", "--out", tmp_path, "--minutes", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        found = json.loads((tmp_path / f"{step}.json").read_text())
        assert (found["complete"], found["unavailable"]) == (False, "the time was over before its turn")
    assert (tmp_path / "gpu.md").read_text().count("unavailable: the time was over") == len(STEPS)
