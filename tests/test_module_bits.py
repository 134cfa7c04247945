"""Modules with bits of their own: written with rules, read, run and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import manifest_of, run
from safetensors.torch import load_file, save_file
from tiny_families import write_calibration, write_family
from tiny_published import transformers_of, write_dequantised, write_published

from qwenq.errors import ModelError, UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import pack_zeros, validate_quantised
from qwenq.recipe import Recipe
from qwenq.runtime.engine import load


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def mixed(tmp_path: Path, family: str = "qwen3_moe", *, any_engine: bool = False, **bits: Any) -> Path:
    model = write_published(tmp_path / "m", family)
    tokens = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    run(model, tmp_path / "out", calibration=tokens, module_bits=bits, any_engine=any_engine)
    return tmp_path / "out"


def test_bits_by_module_are_written_and_read(tmp_path: Path) -> None:
    out = mixed(tmp_path, self_attn=8)
    tensors = load_file(out / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        assert tensors[f"{prefix}.self_attn.q_proj.qweight"].shape == (64 * 8 // 32, 64)
        assert tensors[f"{prefix}.mlp.experts.1.up_proj.qweight"].shape == (64 * 4 // 32, 32)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    (rule,) = [key for key in settings["dynamic"] if key.startswith("+:")]
    assert settings["dynamic"][rule]["bits"] == 8
    assert ["mlp.experts"] in settings["modules_in_block_to_quantize"]
    assert json.loads((out / "quantize_config.json").read_text())["dynamic"] == settings["dynamic"]
    checkpoint = open_checkpoint(out)
    validate_quantised(checkpoint.source, QuantConfig.read(checkpoint.config))


def test_mixed_bits_run_as_they_are_dequantised(tmp_path: Path) -> None:
    out = mixed(tmp_path, self_attn=8)
    reference = transformers_of(write_dequantised(out, tmp_path / "plain"))
    ids = list(range(3, 43))
    engine = load(out, device="cpu", dtype="float32", engine="transformers")
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(engine.logits([ids])[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [{"q_proj": 8}, {"self_attn": 8}, {"down_proj": 16}])
def test_the_fast_engine_runs_mixed_bits(tmp_path: Path, bits: dict[str, int]) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    run(model, tmp_path / "out", module_bits=bits, any_engine=True)
    reference = transformers_of(write_dequantised(tmp_path / "out", tmp_path / "plain"))
    ids = list(range(3, 43))
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    engine = load(tmp_path / "out", device="cpu", dtype="float32", engine="fast")
    torch.testing.assert_close(engine.logits([ids])[0], expected, atol=1e-4, rtol=0)


def test_eight_bits_cost_less_than_four(tmp_path: Path) -> None:
    model = write_published(tmp_path / "m", "qwen3_moe")
    tokens = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    values = []
    for bits in (4, 8):
        done = run(model, tmp_path / f"out{bits}", calibration=tokens, module_bits={"self_attn": bits})
        assert done.check is not None
        values.append(done.check.kl.value)
    assert values[0] > 2 * values[1] > 0


def test_experts_can_be_left_as_they_are(tmp_path: Path) -> None:
    out = mixed(tmp_path, any_engine=True, experts=16)  # vLLM has no such path for a width of 64
    manifest = manifest_of(out)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert manifest["not_quantised"][name] == "as module_bits says"
    assert "expert_tokens" not in manifest
    assert torch.equal(
        load_file(out / "model.safetensors")[name], load_file(tmp_path / "m" / "model.safetensors")[name]
    )


def test_experts_of_a_block_have_bits_in_common(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="experts of a block"):
        mixed(tmp_path, down_proj=8)


@pytest.mark.parametrize(
    ("pattern", "said"), [("no_such", "in the name of no linear layer"), ("(", "not a pattern")]
)
def test_a_pattern_that_finds_nothing_is_refused(tmp_path: Path, pattern: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mixed(tmp_path, **{pattern: 8})


def test_leaving_everything_as_it_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no linear layer would be quantised"):
        mixed(tmp_path, proj=16)


def test_a_block_may_stay_as_it_is(tmp_path: Path) -> None:
    """A dense block beside sparse ones, all of whose linears are left alone."""
    model = write_published(tmp_path / "m", "qwen3_moe", mlp_only_layers=[0])
    run(model, tmp_path / "out", module_bits={"attn": 16, r"mlp\.(gate|up|down)": 16})
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[2] for name in names if name.endswith(".qweight")} == {"1"}


def test_rules_that_contradict_the_tensors_are_refused(tmp_path: Path) -> None:
    out = mixed(tmp_path, self_attn=8)
    for change in ({"-:.*experts.*": {}}, {".*self_attn.*": {"bits": 4}}):
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["dynamic"] = change
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError):
            load(out, device="cpu", dtype="float32", engine="transformers")


def test_rules_of_published_mixtures_are_read(tmp_path: Path) -> None:
    """Qwen's own files name what is not quantised in one broad pattern, or in several."""
    out = mixed(tmp_path, self_attn=16)
    config = json.loads((out / "config.json").read_text())
    settings = {
        key: config["quantization_config"][key] for key in ("bits", "group_size", "quant_method", "sym")
    }
    official = {"lm_head": {}, "model.language_model.embed_tokens": {}, "-:.*attn.*": {}, "-:.*mtp.*": {}}
    ids = list(range(3, 43))
    expected = load(out, device="cpu", dtype="float32", engine="transformers").logits([ids])[0]
    for dynamic in (official, {"-:.*.mlp.gate.*": {}}):
        config["quantization_config"] = {**settings, "desc_act": False, "dynamic": dynamic}
        (out / "config.json").write_text(json.dumps(config))
        found = load(out, device="cpu", dtype="float32", engine="transformers").logits([ids])[0]
        assert torch.equal(found, expected)


def test_a_recipe_may_say_so() -> None:
    recipe = Recipe().override(quantize={"module_bits": {"linear_attn": 16}})
    assert recipe.quantize.module_bits == {"linear_attn": 16}
    with pytest.raises(UsageError, match="module_bits"):
        Recipe().override(quantize={"module_bits": {"linear_attn": 5}})


def test_zero_points_of_the_other_format_are_read_as_what_they_are(tmp_path: Path) -> None:
    """A published Int4 model says gptq, and its zero points are stored as in gptq_v2."""
    out = mixed(tmp_path, self_attn=8)
    ids = list(range(3, 43))
    expected = load(out, device="cpu", dtype="float32", engine="transformers").logits([ids])[0]
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            bits = 8 if "self_attn" in name else 4
            zeros = torch.full((tensor.shape[1] * 32 // bits, tensor.shape[0]), 1 << (bits - 1))
            tensors[name] = pack_zeros(zeros.to(torch.uint8), bits, "gptq_v2")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(out)
    assert any("zero points are stored as in gptq_v2" in notice for notice in checkpoint.notices)
    found = load(checkpoint, device="cpu", dtype="float32", engine="transformers").logits([ids])[0]
    assert torch.equal(found, expected)
