"""benchmarks/gpu.py without a GPU: a dry run goes through every line of it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from qwenq.results import read_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def integral():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from _gpu_points import integral
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return integral


def test_the_time_of_a_generation_is_the_area_under_its_steps(integral) -> None:
    flat = integral((1, 100, 200), [0.5, 0.5, 0.5], 200)
    assert flat == pytest.approx(100.0)
    assert integral((1, 100, 200), [0.5, 0.5, 0.5], 50) == pytest.approx(25.0)
    assert integral((1, 100), [0.5, 0.5], 150) == pytest.approx(75.0)
    # Steps that grow from 1 to 3 seconds over 100 positions: their mean is 2.
    assert integral((1, 101), [1.0, 3.0], 101) == pytest.approx(1 + 200)
    assert integral((1, 101), [1.0, 3.0], 51) == pytest.approx(1 + 50 * 1.5)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("--out", tmp_path / "out")
    assert done.returncode == 2
    assert "no CUDA GPU here: nothing was measured" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dry_run_measures_everything_and_claims_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--dry-run", "--out", tmp_path, "--minutes", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "decode_gpu.json").read_text())
    assert report["dry_run"] is True
    assert len(report["checks"]) > 30
    assert all(check["passed"] for check in report["checks"])
    assert {each["kernel"] for each in report["kernels"]} == {"triton-int4", "triton-int8"}
    assert "No number here means anything" in (tmp_path / "decode_gpu.md").read_text()
    rows = read_rows(tmp_path)
    assert len(rows) == len(report["rows"])
    status = {
        (row.point["engine"], row.model.precision, row.point["attention"]): (row.status, row.reason)
        for row in rows
        if row.metric == "speed.decode"
    }
    for engine in ("fast", "transformers"):
        assert status[engine, "int4", "split"] == ("ok", None)
        assert status[engine, "int4", "off"] == ("ok", None)
        assert status[engine, "int4", "v2"][0] == "unavailable"
        assert "NVIDIA" in str(status[engine, "int4", "v2"][1])
        assert status[engine, "fp32", "v2"] == ("ok", None)
    said = next(
        row
        for row in rows
        if row.model.precision == "fp32" and row.point["attention"] == "v2" and row.settings
    )
    assert "attention off: FlashAttention takes no float32" in said.settings["attention"]
    assert "attention off" in said.implementation
    assert {"memory.load", "memory.generate", "bandwidth.share", "speed.prefill", "speed.protocol"} <= {
        row.metric for row in rows
    }
    protocol = {
        (row.model.precision, row.point["attention"], row.point["tokens"]): row.status
        for row in rows
        if row.metric == "speed.protocol"
    }
    assert {key for key, status in protocol.items() if status == "ok"} == {
        *product(["int4"], ["split", "off"], [2, 3]),
        *product(["fp32"], ["v2", "off"], [2, 3]),  # v2: without it, as in the cards
    }
    assert {key for key, status in protocol.items() if status != "ok"} == {*product(["int4"], ["v2"], [2, 3])}
    memory = {row.point["tokens"] for row in rows if row.metric == "memory.generate"}
    assert memory == {1, 2, 3}  # encoding the prompt, and both lengths
    again = run("--dry-run", "--out", tmp_path / "again", "--minutes", "0", "--known", tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    kept = {row.identity: row for row in read_rows(tmp_path / "again")}
    assert all(kept[row.identity] == row for row in rows if row.status == "ok")


@pytest.mark.slow
def test_what_there_was_no_time_for_is_a_row(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--dry-run", "--out", tmp_path, "--minutes", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path)
    assert all(row.details == {"again": True} for row in rows)
    assert {(row.metric, row.status, row.reason) for row in rows} == {
        ("speed.decode", "unavailable", "the time was over before its turn"),
        ("speed.prefill", "unavailable", "the time was over before its turn"),
        ("speed.protocol", "unavailable", "its steps were not measured, so nobody knows how long it takes"),
    }
