"""``qwenq calibrate`` as a user runs it; in this process where that shows the same, for speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_shell import Shell
from safetensors.torch import load_file
from tiny_model import TEXT, write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return Shell("calibrate", monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_file_once_written_is_kept(model: Path, calibrate: Shell) -> None:
    Path("notes.txt").write_text(TEXT * 50)
    asked = [model, "--source", "notes.txt", "--out", "calib.safetensors", "--samples", 3, "--seq-len", 32]
    first = calibrate(*asked)
    assert first.code == 0, first.err
    facts = (
        "3 × 32 tokens = 96",
        "8 × 32, from the same documents",
        "notes.txt",
        "1 used of 1 read",
        "begins",
    )
    assert all(fact in first.out for fact in facts), first.out
    assert json.loads(Path("calib.safetensors.json").read_text())["tokens"] in first.out
    assert load_file("calib.safetensors")["tokens"].shape == (3, 32)

    same = calibrate(*asked)
    assert same.code == 0 and "existed, unchanged" in same.out
    Path("copy.txt").write_text(TEXT * 50)
    of_copy = calibrate(*asked[:2], "copy.txt", *asked[3:], "--json")  # the file says what it was made of
    assert json.loads(of_copy.out) == json.loads(Path("calib.safetensors.json").read_text())
    other = calibrate(*asked[:-1], 33)
    assert other.code == 2 and "holds something else" in other.err and "--force" in other.err
    assert load_file("calib.safetensors")["tokens"].shape == (3, 32)
    forced = calibrate(*asked[:-1], 33, "--force", "--json")
    assert forced.code == 0 and json.loads(forced.out)["seq_len"] == 33
    assert load_file("calib.safetensors")["tokens"].shape == (3, 33)


def test_a_file_that_is_no_calibration_set_is_not_overwritten(model: Path, calibrate: Shell) -> None:
    Path("notes.txt").write_text(TEXT * 50)
    Path("weights.safetensors").write_bytes(b"precious")
    refused = calibrate(
        model, "--source", "notes.txt", "--seq-len", 32, "--samples", 3, "--out", "weights.safetensors"
    )
    assert refused.code == 2 and Path("weights.safetensors").read_bytes() == b"precious"


def test_self_text_is_the_same_in_another_process(model: Path, calibrate: Shell, tmp_path: Path) -> None:
    asked = [str(model), *["--samples", "2", "--held-out", "1", "--seq-len", "16", "--json", "--out"]]
    here = calibrate(*asked, "here.safetensors")
    assert here.code == 0 and json.loads(here.out)["source"] == "self", here.err
    command = [sys.executable, "-m", "qwenq", "calibrate", *asked, "there.safetensors"]
    cache = os.environ | {"QWENQ_CACHE": str(tmp_path / "another cache"), "PYTHONPATH": str(ROOT)}
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=cache)
    assert json.loads(there.stdout) == json.loads(here.out)
    first, second = load_file("here.safetensors"), load_file("there.safetensors")
    assert torch.equal(first["tokens"], second["tokens"])
    assert torch.equal(first["held_out"], second["held_out"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "gone.txt"], 2, "no such text: gone.txt"),
        (["--out", "calib.bin"], 2, "has to end in .safetensors"),
        (["--out", "."], 2, "--out is a folder"),
        (["--source", "cut.jsonl"], 1, "cut.jsonl, line 2"),
    ],
)
def test_errors_are_messages(
    model: Path, calibrate: Shell, arguments: list[str], code: int, message: str
) -> None:
    Path("cut.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    out = [] if "--out" in arguments else ["--out", "calib.safetensors"]
    result = calibrate(model, *arguments, *out)
    assert result.code == code and message in result.err and "Traceback" not in result.err
    assert not list(Path().glob("calib.*"))
