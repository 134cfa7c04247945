"""Every dense generation from its config alone: quantise, save, load in transformers, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dequantised import logits_of, transformers_model
from tiny_families import random_tokens, write_calibration, write_family
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_format import quantised_modules
from qwenq.runtime.engine import load

register()
runner = CliRunner()

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
WINDOW_OFF = {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}
GENERATIONS: dict[str, dict[str, Any]] = {
    "qwen1.5": {"family": "qwen2", "num_key_value_heads": 4, "tie_word_embeddings": False, **WINDOW_OFF},
    "qwen2": {"family": "qwen2", "num_key_value_heads": 1, "rope_theta": 1_000_000.0, **WINDOW_OFF},
    "qwen2.5-yarn": {"family": "qwen2", "tie_word_embeddings": False, "rope_scaling": YARN},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "qwen3-untied": {"family": "qwen3", "head_dim": 8, "tie_word_embeddings": False},
    "llama3": {"family": "llama", "rope_scaling": LLAMA3},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def quantised(tmp_path: Path, bits: int, family: str, **changes: Any) -> tuple[Path, Path]:
    """A small random model, and what `qwenq quantize` made of it."""
    base = write_family(tmp_path / "base", family, **changes)
    tokens = write_calibration(base, tmp_path / "tokens.safetensors")
    arguments = ["quantize", str(base), "--calibration", str(tokens), "--out", str(tmp_path / "out")]
    done = runner.invoke(app, [*arguments, "--bits", str(bits), "--dtype", "float32", "--device", "cpu"])
    assert done.exit_code == 0, (done.output, done.exception)
    return base, tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name in GENERATIONS for bits in (4, 8) if bits == 4 or name.startswith("qwen3")],
)
def test_quantised_saved_and_loaded_in_transformers(tmp_path: Path, name: str, bits: int) -> None:
    base, out = quantised(tmp_path, bits, **GENERATIONS[name])
    checkpoint = open_checkpoint(out)
    linears = 7 * checkpoint.config["num_hidden_layers"]
    assert len(quantised_modules(checkpoint.source)) == linears
    ids = random_tokens(base, 1, 200, seed=5)[0].tolist()
    reference, whole = transformers_model(out), transformers_model(base)
    expected = logits_of(reference, ids)
    for engine in ("fast", "transformers"):
        (found,) = load(out, device="cpu", dtype="float32", engine=engine).logits([ids])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # Quantised is near the base, and is not the base.
    error = (expected - logits_of(whole, ids)).norm() / logits_of(whole, ids).norm()
    assert 0 < error < (0.3 if bits == 4 else 0.03)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_greedy_text_of_the_quantised_model_is_transformers(tmp_path: Path, name: str) -> None:
    base, out = quantised(tmp_path, 4, **GENERATIONS[name])
    prompt = random_tokens(base, 1, 20, seed=6)[0].tolist()
    with torch.inference_mode():
        whole = transformers_model(out).generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    for engine in ("fast", "transformers"):
        done = load(out, device="cpu", dtype="float32", engine=engine).generate([prompt], 30)
        assert done.answers[0].ids == whole[0, 20:].tolist()


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("qwen2_vl", "the vision tower"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "chat"])
def test_older_vision_models_are_not_yet(tmp_path: Path, command: str, model_type: str, missing: str) -> None:
    folder = write_family(tmp_path / "model", "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    done = runner.invoke(app, [command, str(folder)], input="hello\n")
    assert isinstance(done.exception, UnsupportedError), done.output
    assert f"{model_type} is not supported yet: {missing} would have to be added" in str(done.exception)
    assert not (tmp_path / "model-GPTQ-Int4").exists()
