"""``--weights random`` on the commands that take a MODEL: what works, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qwenq.calibration import CalibrationSet
from qwenq.cli.app import app
from qwenq.cli.commands import register
from qwenq.errors import UsageError
from qwenq.models.checkpoint import open_checkpoint

SMALLEST = "smollm2-135m-instruct"


def invoke(*arguments: str | Path) -> str:
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
        ("--samples", "0", "--samples is 0"),
        ("--seq-len", "1", "--seq-len is 1"),
        ("--held-out", "-1", "--held-out is -1"),
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


def test_convert_writes_a_random_checkpoint(tmp_path: Path) -> None:
    shown = invoke("convert", SMALLEST, tmp_path / "m", "--weights", "random", "--max-shard", "100MB")
    assert "random weights" in shown
    checkpoint = open_checkpoint(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    name = "model.layers.0.mlp.down_proj.weight"
    assert bool(torch.isfinite(checkpoint.read(name).float()).all())
    assert json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"] == 30


def test_zeros_belong_to_gptq(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not GPTQ"):
        invoke("convert", SMALLEST, tmp_path / "m", "--weights", "random", "--zeros", "v2")


def test_there_is_no_chat_with_random_weights() -> None:
    with pytest.raises(UsageError, match="nothing to say"):
        invoke("chat", "qwen-7b-chat", "--weights", "random")
