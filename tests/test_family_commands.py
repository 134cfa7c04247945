"""Every command on every family: as a user types them, on small models as they are published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from evals.benchmark_data import write_mmlu
from safetensors.torch import load_file
from tiny_chain import RECIPE
from tiny_families import write_calibration
from tiny_published import FAMILIES, write_published
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.results import read_rows
from qwenq.runtime.engine import load

register()
STRANGERS = ("gemma3_text", "mixtral", "deepseek_v3")
ON_CPU = ("--device", "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def call(*argv: object, **options: Any) -> str:
    """What a command prints; it has to succeed."""
    result = CliRunner().invoke(app, [str(word) for word in argv], **options)
    assert result.exit_code == 0, (argv, result.output, result.exception)
    return result.stdout


@pytest.mark.parametrize("family", [*FAMILIES, *STRANGERS])
def test_commands_run_it(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "model", family, max_position_embeddings=8192)
    text, out, runs = tmp_path / "text.txt", tmp_path / "out", tmp_path / "runs"
    text.write_text("Quantise the weights, measure what it cost, and write the table.\n" * 40)
    engine = ("--engine", "transformers") if family in STRANGERS else ()

    sizes = ("--samples", 2, "--seq-len", 32, "--held-out", 1)
    call("calibrate", model, "--source", text, *sizes, "--out", tmp_path / "calibrated.safetensors")
    tokens = write_calibration(model, tmp_path / "t.safetensors")
    call("quantize", model, "--calibration", tokens, "--out", out, "--dtype", "float32", *ON_CPU)
    said = call("check", out, "--against", model, "--text", text, "--samples", 2, "--seq-len", 32)
    assert "KL" in said
    assert ("by part" in said) is (family not in ("qwen3_vl", "gemma3_text"))
    assert "gptqmodel" in call("check", out, "--for", "gptqmodel")
    said = call("chat", out, *engine, "--max-new-tokens", 3, *ON_CPU, input="hello\n")
    assert said.strip()
    lengths = ("--lengths", "16,32", "--samples", 2, *engine, *ON_CPU)
    rows = json.loads(call("perplexity", out, "--text", text, *lengths, "--out", runs, "--json"))["rows"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    suite = ("--sample", "--tasks", "mmlu", "--limit", 1, *engine, *ON_CPU)
    rows = json.loads(call("eval", out, *suite, "--out", runs, "--json"))["rows"]
    assert rows and all(row["status"] == "ok" for row in rows)
    call("report", runs, "--out", tmp_path / "page", "--no-card")
    page = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    assert "KL divergence" in page
    mixed = "expert_tokens" in json.loads((out / "qwenq.json").read_text())
    assert ("Calibration tokens of experts" in page) is mixed


@pytest.mark.parametrize("family", STRANGERS)
def test_its_folder_is_converted_and_computes_the_same(tmp_path: Path, family: str) -> None:
    model, out, v2 = (tmp_path / name for name in ("model", "out", "v2"))
    write_published(model, family)
    tokens = write_calibration(model, tmp_path / "t.safetensors")
    call("quantize", model, "--calibration", tokens, "--out", out, "--dtype", "float32", *ON_CPU)
    call("convert", out, v2, "--zeros", "v2")
    before, after = (load_file(folder / "model.safetensors") for folder in (out, v2))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith(".qzeros"))
    first, second = (
        load(folder, device="cpu", dtype="float32", engine="transformers").logits([[1, 2, 3]])[0]
        for folder in (out, v2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_planned(tmp_path: Path, family: str) -> None:
    plan = json.loads(call("plan", write_published(tmp_path / "model", family), "--json"))
    assert [precision["label"] for precision in plan["precisions"]] == ["FP32", "Int8", "Int4"]
    assert 0 < plan["active_parameters"] <= plan["parameters"]
    assert (plan["active_parameters"] < plan["parameters"]) is ("moe" in family or family == "qwen3_next")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a process for each step, and for each point that is profiled
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "qwen3_vl_moe"])
def test_a_whole_run_quantises_evaluates_profiles_and_reports(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "tiny", family, max_position_embeddings=2048)
    write_calibration(model, tmp_path / "calibration.safetensors")
    write_mmlu(tmp_path / "data")
    recipe = RECIPE.format(limit=3, attention='["sdpa"]')
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    command = [sys.executable, "-m", "qwenq", "run", "recipe.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "runs" / "tiny")
    found = {(row.metric, row.model.precision) for row in rows if row.status == "ok"}
    assert {("accuracy", "int4"), ("kl", "int4"), ("speed.decode", "fp32"), ("speed.decode", "int4")} <= found
    assert (tmp_path / "reports" / "tiny" / "index.html").is_file()
