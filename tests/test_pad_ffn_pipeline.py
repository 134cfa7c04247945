"""`qwenq quantize --pad-ffn`: a wider MLP, zeros where they belong, and a check that accepts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_shell import Shell
from pipeline import Recorder, manifest_of, run
from quantize_shell import QuantizeShell
from tiny_families import write_calibration, write_family

from qwenq.errors import UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource
from qwenq.models.pad_ffn import widened
from qwenq.recipe import read_recipe

FFN, TO, GROUP = 96, 128, 32  # three groups, which two GPUs cannot share; four, which they can


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def added() -> torch.Tensor:
    return torch.tensor([channel % 2 == 1 and channel < 2 * (TO - FFN) for channel in range(TO)])


@pytest.mark.parametrize("width", ["128", "auto"])
def test_the_command_writes_it_and_check_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_family(tmp_path / "m", "qwen2")
    assert json.loads((model / "config.json").read_text())["intermediate_size"] == FFN
    saved = write_calibration(model, tmp_path / "cal.safetensors")
    options = ["--calibration", saved, "--device", "cpu", "--dtype", "float32", "--out", "out"]
    ran = QuantizeShell(monkeypatch, capsys, model)("--group-size", GROUP, "--pad-ffn", width, *options)
    assert ran.code == 0, ran.err
    assert f"FFN {FFN} → {TO}" in ran.out
    config = json.loads(Path("out/config.json").read_text())
    assert config["intermediate_size"] == TO
    assert config["quantization_config"]["group_size"] == GROUP
    manifest = manifest_of(Path("out"))
    assert manifest["base"]["fingerprint"] == open_checkpoint(model).fingerprint
    assert manifest["recipe"]["quantize"]["pad_ffn"] == (int(width) if width != "auto" else "auto")
    check = Shell("check", monkeypatch, capsys)
    for named in ([], ["--against", model]):
        done = check("out", *named, "--text", saved, "--device", "cpu")
        assert done.code == 0, done.err
        assert "fingerprint" not in done.err


@pytest.mark.parametrize("sym", [True, False])
def test_added_channels_are_exactly_zero_on_the_disk(tmp_path: Path, sym: bool) -> None:
    model = write_family(tmp_path / "m", mlp_bias=True)
    made = run(model, tmp_path / "out", pad_ffn=TO, group_size=GROUP, sym=sym, any_engine=True)
    base, written = open_checkpoint(model), open_checkpoint(made.folder)
    source = DequantisedSource(written.source, QuantConfig.read(written.config), torch.float32)
    assert made.check is not None
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        for name in ("gate_proj", "up_proj"):
            weight = source.read(f"{mlp}.{name}.weight")
            assert weight.shape == (TO, 64)
            assert not weight[added()].any()
            bias = written.read(f"{mlp}.{name}.bias")
            assert torch.equal(bias[~added()], base.read(f"{mlp}.{name}.bias"))
            assert not bias[added()].any()
        down = source.read(f"{mlp}.down_proj.weight")
        assert down.shape == (64, TO)
        assert not down[:, added()].any()


def test_an_unquantised_model_computes_the_same_when_it_is_wider(tmp_path: Path) -> None:
    """The whole model, in transformers' own code."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(write_family(tmp_path / "m", "qwen3", "float32"))
    logits = []
    for one in (checkpoint, widened(checkpoint, TO)):
        settings = {key: value for key, value in one.config.items() if key != "model_type"}
        config = AutoConfig.for_model("qwen3", **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        model.load_state_dict({name: one.read(name).double() for name in one.names()}, strict=False)
        model.tie_weights()
        with torch.no_grad():
            logits.append(model(torch.arange(3, 40)[None]).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-12)


def test_the_group_size_is_that_of_the_plan(tmp_path: Path) -> None:
    """By the model as it is: its wider MLP could take groups of 64, of which there would be two."""
    ear = Recorder()
    made = run(
        write_family(tmp_path / "m", hidden_size=128, head_dim=32), tmp_path / "out", ear, pad_ffn="auto"
    )
    config = json.loads((made.folder / "config.json").read_text())
    assert (config["intermediate_size"], config["quantization_config"]["group_size"]) == (TO, GROUP)
    said = "\n".join(ear.lines)
    assert "4 groups instead of 3, which 1, 2, 4 GPUs can share" in said
    assert "group size 32: the largest" in said


def test_auto_says_so_where_there_is_nothing_to_gain(tmp_path: Path) -> None:
    ear = Recorder()
    made = run(write_family(tmp_path / "m", intermediate_size=128), tmp_path / "out", ear, pad_ffn="auto")
    assert json.loads((made.folder / "config.json").read_text())["intermediate_size"] == 128
    assert "FFN 128 stays: no padding lets more GPUs share it than 1" in "\n".join(ear.lines)


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (64, "cannot be padded to 64"),
        (256, "cannot be padded to 256"),
        (100, "no multiple of the group size 32"),
    ],
)
def test_widths_that_cannot_be_are_refused_before_any_work(tmp_path: Path, width: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        run(write_family(tmp_path / "m"), tmp_path / "out", pad_ffn=width)
    assert caught.value.where == "--pad-ffn"
    assert not (tmp_path / "out.partial").exists()


def test_a_recipe_can_ask_for_it_and_the_command_line_can_take_it_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[quantize]\npad_ffn = "auto"\n')
    recipe = read_recipe(path)
    assert recipe.quantize.pad_ffn == "auto"
    assert recipe.override(quantize={"pad_ffn": "none"}).quantize.pad_ffn == "none"
    for wrong in ('"wide"', "0", "-128"):
        path.write_text(f"[quantize]\npad_ffn = {wrong}\n")
        with pytest.raises(UsageError, match=r"quantize\.pad_ffn"):
            read_recipe(path)


def test_a_width_that_is_none_is_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = QuantizeShell(monkeypatch, capsys, tmp_path)
    assert "quantize.pad_ffn = 'wide'" in shell.refused("--pad-ffn", "wide").err


def test_an_unfinished_run_of_another_width_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_family(tmp_path / "m")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwenq.quantization._stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", pad_ffn=TO)
    with pytest.raises(UsageError, match="other settings"):
        run(model, tmp_path / "out")
