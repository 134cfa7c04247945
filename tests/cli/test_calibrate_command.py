"""``qwenq calibrate`` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import TEXT, write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def calibrate(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", "calibrate", *map(str, arguments)]
    environment = os.environ | {"QWENQ_CACHE": str(cwd / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_a_file_once_written_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(TEXT * 50)
    asked = [model, "--source", "notes.txt", "--out", "calib.safetensors", "--samples", 3, "--seq-len", 32]
    first = calibrate(tmp_path, *asked)
    assert first.returncode == 0, first.stderr
    for expected in (
        "3 × 32 tokens = 96",
        "8 × 32, from ",
        "notes.txt",
        "begins      'Quantise the weights, ",
    ):
        assert expected in first.stdout
    manifest = json.loads((tmp_path / "calib.safetensors.json").read_text())
    assert manifest["tokens"] in first.stdout
    assert load_file(tmp_path / "calib.safetensors")["tokens"].shape == (3, 32)

    same = calibrate(tmp_path, *asked)
    assert same.returncode == 0 and "was there already, unchanged" in same.stdout
    other = calibrate(tmp_path, *asked[:-1], 33)
    assert other.returncode == 2 and "holds something else" in other.stderr and "--force" in other.stderr
    assert load_file(tmp_path / "calib.safetensors")["tokens"].shape == (3, 32)
    forced = calibrate(tmp_path, *asked[:-1], 33, "--force", "--json")
    assert forced.returncode == 0 and json.loads(forced.stdout)["seq_len"] == 33
    assert load_file(tmp_path / "calib.safetensors")["tokens"].shape == (3, 33)


def test_self_text_is_the_same_in_another_process(model: Path, tmp_path: Path) -> None:
    tokens = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()  # each with a cache of its own
        sizes = ["--samples", 2, "--held-out", 1, "--seq-len", 16]
        result = calibrate(tmp_path / name, model, "--out", "calib.safetensors", *sizes, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["source"] == "self"
        tokens.append(load_file(tmp_path / name / "calib.safetensors"))
    assert torch.equal(tokens[0]["tokens"], tokens[1]["tokens"])
    assert torch.equal(tokens[0]["held_out"], tokens[1]["held_out"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "gone.txt"], 2, "no such calibration source: gone.txt"),
        (["--out", "calib.bin"], 2, "has to end in .safetensors"),
        (["--source", "cut.jsonl"], 1, "cut.jsonl, line 2"),
    ],
)
def test_errors_have_no_traceback(
    model: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "cut.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    out = [] if "--out" in arguments else ["--out", "calib.safetensors"]
    result = calibrate(tmp_path, model, *arguments, *out)
    assert result.returncode == code and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("calib.*"))
