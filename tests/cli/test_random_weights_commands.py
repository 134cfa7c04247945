"""``--weights random`` on the commands that take a MODEL: what works, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from brief_profiles import profile_briefly
from typer.testing import CliRunner

from qwenq.calibration import CalibrationSet
from qwenq.cli.app import app, register
from qwenq.errors import UsageError
from qwenq.models import catalogue
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_format import quantised_modules
from qwenq.models.integrity import verify_files
from qwenq.models.opening import open_model
from qwenq.profiling.measure import measure
from qwenq.results import read_rows

SMALLEST = "smollm2-135m-instruct"


def invoke(*arguments: object) -> str:
    register()
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_random_tokens_are_written_and_the_same_again(tmp_path: Path) -> None:
    out = tmp_path / "random.safetensors"
    sizes = ("--samples", "3", "--seq-len", "16", "--held-out", "2", "--seed", "5")
    shown = invoke("calibrate", "qwen-7b-chat", "--weights", "random", *sizes, "--out", out)
    assert "drawn evenly from the vocabulary" in shown
    made = CalibrationSet.load(out)
    assert made.tokens.shape == (3, 16)
    assert made.held_out.shape == (2, 16)
    assert made.manifest.source == "random"
    assert int(made.tokens.max()) > 100_000  # of Qwen's 151,936
    invoke("calibrate", "qwen-7b-chat", "--weights", "random", *sizes, "--out", out)  # unchanged: not refused


def test_random_weights_read_no_text(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words")
    with pytest.raises(UsageError, match="no tokenizer"):
        invoke(
            "calibrate",
            "qwen-7b-chat",
            "--weights",
            "random",
            "--source",
            text,
            "--out",
            tmp_path / "x.safetensors",
        )


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--samples", "0", "calibration.samples = 0"),
        ("--seq-len", "1", "--seq-len is 1"),
        ("--held-out", "-1", "calibration.held_out = -1"),
        ("--seq-len", "9999999", "beyond 8192 this Qwen v1 model"),
        ("--column", "text", "no tokenizer to read a text"),
        ("--split", "train", "no tokenizer to read a text"),
    ],
)
def test_sizes_and_columns_that_mean_nothing_are_refused(
    option: str, value: str, said: str, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match=said):
        invoke("calibrate", "qwen-7b-chat", "--weights", "random", option, value, "--out", out)
    assert not out.exists()


def test_a_misspelt_catalogue_name_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        invoke("calibrate", "qwen-7b-chta", "--weights", "random", "--out", tmp_path / "x.safetensors")
    assert "qwen-7b-chat" in str(error.value)


@pytest.mark.parametrize("name", [SMALLEST, "bundled"])
def test_convert_writes_a_random_checkpoint(tmp_path: Path, name: str) -> None:
    shown = invoke("convert", name, tmp_path / "m", "--weights", "random", "--max-shard", "100MB")
    assert "random weights" in shown
    checkpoint = open_checkpoint(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    name = "model.layers.0.mlp.down_proj.weight"
    assert bool(torch.isfinite(checkpoint.read(name).float()).all())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 30


def test_zeros_belong_to_gptq(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one layout"):
        invoke("convert", SMALLEST, tmp_path / "m", "--weights", "random", "--zeros", "v2")


# From a catalogue name to numbers, with the catalogue's Qwen-7B-Chat made small


@pytest.fixture
def small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a catalogue model of two narrow layers."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    real = catalogue.config_for
    monkeypatch.setattr(catalogue, "config_for", lambda name: real(name) | small)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return "qwen-7b-chat"


@pytest.fixture
def quantised(small_catalogue: str, tmp_path: Path) -> Path:
    sizes = ("--samples", 4, "--seq-len", 32, "--dtype", "float32", "--device", "cpu", "--seed", 3)
    out = tmp_path / "q"
    shown = invoke("quantize", small_catalogue, "--weights", "random", "--bits", 4, *sizes, "--out", out)
    assert "random weights (seed 3) in the shape of qwen-7b-chat" in shown
    assert "random tokens calibrate them" in shown
    assert "no tokenizer is written" in shown
    assert "check         not possible with random weights" in shown
    return out


def test_a_catalogue_model_is_quantised_and_says_what_it_is(quantised: Path, small_catalogue: str) -> None:
    checkpoint = open_checkpoint(quantised)
    assert checkpoint.config["qwenq_random_weights"] == {"seed": 3}
    assert len(quantised_modules(checkpoint.source)) == 2 * 7
    manifest = json.loads((quantised / "qwenq.json").read_text())
    assert manifest["check"] is None
    assert manifest["base"]["fingerprint"] == open_model(small_catalogue, "random", 3).fingerprint
    assert verify_files(quantised)


def test_accuracy_of_the_quantised_random_model_is_refused(quantised: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words\n" * 100)
    for command in (
        ("eval", quantised, "--tasks", "mmlu", "--data", tmp_path),
        ("perplexity", quantised, "--text", text, "--lengths", "16"),
        ("check", quantised, "--text", text),
    ):
        with pytest.raises(UsageError, match=r"random weights: \w+ would mean nothing"):
            invoke(*command)
    assert not (tmp_path / "runs").exists()


def test_texts_need_a_tokenizer_that_random_weights_do_not_have(small_catalogue: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words\n" * 100)
    with pytest.raises(UsageError, match="no tokenizer to read a text") as error:
        invoke("quantize", small_catalogue, "--weights", "random", "--calibration", "text.txt", "--out", "q")
    assert "leave --calibration out" in str(error.value)
    with pytest.raises(UsageError, match="beyond 8192 this Qwen v1 model"):
        invoke("quantize", small_catalogue, "--weights", "random", "--seq-len", 8193, "--out", "q")
    assert not (tmp_path / "q").exists()


def test_a_profile_of_random_weights_has_figures(
    small_catalogue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = {
        "device": "cpu",
        "free_bytes": 1 << 34,
        "copy_bytes_per_s": 1e10,
        "operations_per_s": 1e11,
        "dtype": "float32",
        "start_seconds": 1.0,
    }
    monkeypatch.setattr("qwenq.profiling.child.probe", lambda _: device)
    profile_briefly(monkeypatch)
    # Measured in this process, whose catalogue is the small one.
    defaults = {"budget": None, "command": "", "measure": measure}
    monkeypatch.setattr("qwenq.profiling.sweep.run_sweep.__kwdefaults__", defaults)
    out = tmp_path / "run"
    options = ("--tokens", 4, "--encode", 0, "--precision", "fp32,int4", "--device", "cpu", "--out", out)
    invoke("profile", small_catalogue, "--weights", "random", "--seed", 5, *options)
    rows = read_rows(out)
    speeds = {row.model.precision: row for row in rows if row.metric == "speed.decode"}
    assert {name: row.status for name, row in speeds.items()} == {"fp32": "ok", "int4": "ok"}
    assert {row.model.name for row in rows} == {small_catalogue}
    assert speeds["fp32"].model.fingerprint == "random:5:qwen-7b-chat"
    assert speeds["int4"].model.fingerprint == "rounded-4-32:random:5:qwen-7b-chat"
    assert all(row.value > 0 for row in speeds.values())
