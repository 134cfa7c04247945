"""Every family as it is published: quantised by qwenq, then held against transformers' own model of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, run
from safetensors.torch import load_file
from tiny_families import save_calibration
from tiny_published import (
    FAMILIES,
    language_config,
    mean_kl,
    rewrite,
    transformers_of,
    with_draft_head,
    write_dequantised,
    write_published,
)
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.runtime.engine import load

register()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def tokens_for(model: Path, samples: int = 8, held_out: int = 4) -> tuple[Path, torch.Tensor]:
    """A calibration set of random tokens beside the model, and its held-out part."""
    vocab = language_config(model)["vocab_size"]
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab - 5, (samples + held_out, 32), generator=draw)
    path = model.parent / "calibration.safetensors"
    return save_calibration(model, path, tokens[:samples].clone(), tokens[samples:].clone()), tokens[samples:]


def quantised(model: Path, **changes: Any) -> tuple[Path, Any, torch.Tensor]:
    """What `qwenq quantize` makes of the model, its check, and the tokens that this measured."""
    calibration, held_out = tokens_for(model)
    out = model.parent / "out"
    done = run(model, out, calibration=calibration, **changes)
    return out, done.check, held_out


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_check_measures_what_transformers_computes(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "model", family)
    out, check, held_out = quantised(model)
    plain = write_dequantised(out, tmp_path / "plain")
    expected = mean_kl(transformers_of(model), transformers_of(plain), held_out)
    assert expected > 1e-4
    assert check.kl.value == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_other_tensors_stay_as_they_are(tmp_path: Path, family: str) -> None:
    model = rewrite(write_published(tmp_path / "model", family), with_draft_head)
    out, _, _ = quantised(model)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in before if name in after]
    assert sum(name.startswith("mtp.") for name in kept) == 3
    for name in kept:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    packed = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert {name.removesuffix(".weight") for name in before if name not in after} <= packed | {
        name for name in before if name.endswith((".gate_up_proj", ".down_proj"))
    }
    assert packed


def test_config_json_stays_whole(tmp_path: Path) -> None:
    model = write_published(tmp_path / "model", "qwen3_vl")
    (model / "preprocessor_config.json").write_text('{"size": 3}')
    out, _, _ = quantised(model)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    assert after.pop("quantization_config")["bits"] == 4
    assert after == before
    assert (out / "preprocessor_config.json").read_text() == '{"size": 3}'


def test_a_vision_model_without_its_processor_is_remarked_on(tmp_path: Path) -> None:
    model = write_published(tmp_path / "model", "qwen3_vl")
    calibration, _ = tokens_for(model)
    ear = Recorder()
    run(model, tmp_path / "out", ear, calibration=calibration)
    assert any("holds no preprocessor_config.json" in line for line in ear.lines)


@pytest.mark.parametrize("engine", ["fast", "transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_compute_what_transformers_does(tmp_path: Path, family: str, engine: str) -> None:
    model = write_published(tmp_path / "model", family)
    out, _, _ = quantised(model)
    plain = write_dequantised(out, tmp_path / "plain")
    ids = tokens_for(out)[1].flatten()[:40].tolist()
    with torch.inference_mode():
        expected = transformers_of(plain)(input_ids=torch.tensor([ids])).logits[0]
    running = load(out, device="cpu", dtype="float32", engine=engine)
    (found,) = running.logits([ids])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    cache = running.new_cache(1, 40)
    steps = [running.prefill([ids[:30]], cache)]
    steps += [running.decode(torch.tensor([token]), cache) for token in ids[30:]]
    torch.testing.assert_close(torch.cat(steps), expected[29:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_converted_whole(tmp_path: Path, family: str) -> None:
    model = rewrite(write_published(tmp_path / "model", family), with_draft_head)
    out, _, _ = quantised(model)
    result = CliRunner().invoke(app, ["convert", str(out), str(tmp_path / "v2"), "--zeros", "v2"])
    assert result.exit_code == 0, (result.output, result.exception)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "v2"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith(".qzeros"))
    config = json.loads((tmp_path / "v2" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert config.keys() == json.loads((out / "config.json").read_text()).keys()
    ids = tokens_for(out)[1].flatten()[:20].tolist()
    first, second = (
        load(folder, device="cpu", dtype="float32", engine="fast").logits([ids])[0]
        for folder in (out, tmp_path / "v2")
    )
    assert torch.equal(first, second)
