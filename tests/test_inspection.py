"""Decoders that no table here describes: quantised and run by inspection of transformers' code."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, manifest_of, run
from safetensors.torch import load_file
from test_families import quantised
from tiny_families import write_calibration
from tiny_published import (
    STRANGERS,
    fused,
    mean_kl,
    rewrite,
    transformers_of,
    write_dequantised,
    write_published,
)

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.quantization import quantize
from qwenq.recipe import Recipe
from qwenq.runtime.engine import load


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", list(STRANGERS))
def test_the_check_and_the_engine_compute_what_transformers_does(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "model", family)
    out, check, held_out = quantised(model)
    plain = write_dequantised(out, tmp_path / "plain")
    reference = transformers_of(plain)
    expected = mean_kl(transformers_of(model), reference, held_out)
    assert expected > 1e-4
    assert check.kl.value == pytest.approx(expected, rel=0.01)

    ids = held_out.flatten()[:40].tolist()
    with torch.inference_mode():
        wanted = reference(input_ids=torch.tensor([ids])).logits[0]
    engine = load(out, device="cpu", dtype="float32", engine="transformers")
    torch.testing.assert_close(engine.logits([ids])[0], wanted, atol=1e-4, rtol=0)
    cache = engine.new_cache(2, 40)
    rows = engine.prefill([ids[:30], ids[:5]], cache)  # ragged: each row at its own positions
    torch.testing.assert_close(rows, wanted[[29, 4]], atol=1e-4, rtol=0)
    for step in range(5):
        found = engine.decode(torch.tensor([ids[30 + step], ids[5 + step]]), cache)
        torch.testing.assert_close(found, wanted[[30 + step, 5 + step]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", list(STRANGERS))
def test_every_matrix_of_a_block_is_quantised_or_named_and_the_rest_stays(
    tmp_path: Path, family: str
) -> None:
    model, ear = write_published(tmp_path / "model", family), Recorder()
    run(model, tmp_path / "out", ear, calibration=write_calibration(model, tmp_path / "t.safetensors"))
    assert any(f"{family} is none of the model types with a recipe" in line for line in ear.lines)
    assert "no test here runs this model type in them" in ear.lines[-1]
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    packed = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    kept = {name for name in before if name in after}
    assert {name.removesuffix(".weight") for name in before if name not in kept} == packed
    for name in kept:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    view = open_checkpoint(model).view
    shown = {name: view.shown(name)[0] if view is not None else name for name in kept}
    matrices = {shown[name] for name in kept if before[name].ndim > 1 and ".layers." in name}
    assert matrices == set(manifest_of(tmp_path / "out").get("not_quantised", {}))
    assert all(name.endswith((".gate.weight", "shared_expert_gate.weight")) for name in matrices)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_fused_experts_give_the_same_integers_as_experts_apart(tmp_path: Path, family: str) -> None:
    apart = write_published(tmp_path / "apart", family)
    together = rewrite(write_published(tmp_path / "fused", family), fused)
    calibration = write_calibration(apart, tmp_path / "tokens.safetensors")
    for model in (apart, together):
        run(model, tmp_path / f"{model.name}-out", calibration=calibration)
    first, second = (load_file(tmp_path / f"{n}-out" / "model.safetensors") for n in ("apart", "fused"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_mixtrals_experts_have_their_published_names(tmp_path: Path) -> None:
    model = write_published(tmp_path / "model", "mixtral")
    out, _, _ = quantised(model)
    names = load_file(out / "model.safetensors").keys()
    assert "model.layers.1.block_sparse_moe.experts.3.w2.qweight" in names
    assert not any(".mlp." in name for name in names)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    rules = QuantConfig.read({"quantization_config": config})
    assert any("block_sparse_moe" in rule and "gate" in rule for rule in config["dynamic"])
    assert rules.of("model.layers.0.block_sparse_moe.experts.0.w1").bits == 4


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_experts_that_saw_no_token_are_quantised_for_those_of_the_block(tmp_path: Path, family: str) -> None:
    many = {"mixtral": "num_local_experts", "deepseek_v3": "n_routed_experts"}[family]
    model = write_published(tmp_path / "m", family, **{many: 16, "num_experts_per_tok": 1})
    calibration = write_calibration(model, tmp_path / "t.safetensors", samples=1, seq_len=8, held_out=4)
    result = run(model, tmp_path / "out", calibration=calibration)
    unseen = [s for s in manifest_of(tmp_path / "out")["modules"].values() if s.get("tokens") == 0]
    assert len(unseen) >= 2 * 8 * 3
    assert all(0 < stats["error"] < stats["rtn_error"] for stats in unseen)
    assert result.check is not None


def with_next_token_layer(number: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a draft head as DeepSeek and GLM store it: as one block more."""
    prefix, last = f"model.layers.{number}.", f"model.layers.{number - 1}."
    copied = {name.replace(last, prefix): value for name, value in tensors.items() if name.startswith(last)}
    copied[f"{prefix}eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    return tensors | {name: value.bfloat16() for name, value in copied.items()}


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_a_draft_head_behind_the_blocks_is_copied_and_named(tmp_path: Path, family: str) -> None:
    model = rewrite(write_published(tmp_path / "model", family), partial(with_next_token_layer, 3))
    out, _, _ = quantised(model)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, out))
    drafts = [name for name in before if name.startswith("model.layers.3.")]
    assert len(drafts) > 10
    for name in drafts:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name], after[name])
    rules = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert r"-:.*\.layers\.3\..*" in rules
    assert load(out, device="cpu", dtype="float32", engine="transformers").logits([[1, 2]])[0].shape[0] == 2


def save_stranger(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny model of a type that has no place in the tests above."""
    import transformers
    from tiny_published import _IDS, _TEXT, _write_tokenizer

    folder.mkdir()
    vocab = _write_tokenizer(folder, bos=True) + 5
    config = transformers.CONFIG_MAPPING[kind](**{**_TEXT, **_IDS, "vocab_size": vocab, **changes})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}, "a gpt2 has no hidden_size"),
        ("phi", {}, "not a plain stack of blocks: it has"),
        (
            "gpt_oss",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
            "not a linear layer, and no rule says that it may stay",
        ),
    ],
)
def test_what_would_be_left_out_is_an_error(
    tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    model = save_stranger(tmp_path / "m", kind, **changes)
    with pytest.raises((UnsupportedError, ModelError), match=said):
        run(model, tmp_path / "out", calibration=write_calibration(model, tmp_path / "t.safetensors"))
    assert not (tmp_path / "out").exists()


def test_fused_experts_under_other_names_are_read(tmp_path: Path) -> None:
    model = save_stranger(
        tmp_path / "m",
        "granitemoe",
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=32,
        logits_scaling=2.0,
    )
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in load_file(model / "model.safetensors")
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        wanted = transformers_of(model)(input_ids=ids).logits[0]
    found = load(model, device="cpu", dtype="float32", engine="transformers").logits([ids[0].tolist()])[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    run(model, tmp_path / "out", calibration=write_calibration(model, tmp_path / "t.safetensors"))
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.down_proj.qweight" in names
    assert "model.layers.0.block_sparse_moe.router.layer.weight" in names


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "deepseek_v3"])
def test_it_writes_its_own_calibration_text(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "m", family)
    changes = {"samples": 2, "seq_len": 16, "held_out": 2}
    recipe = Recipe().override({"model": str(model)}, calibration=changes, quantize={"dtype": "float32"})
    assert quantize(recipe, tmp_path / "out", Recorder(), device="cpu").check is not None


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    model = write_published(tmp_path / "m", "mistral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    with pytest.raises(UnsupportedError, match="'nobodys' is unknown here") as caught:
        open_checkpoint(model)
    assert "decoders that transformers has built in" in str(caught.value.hint)
    (model / "config.json").write_text(
        json.dumps(config | {"architectures": ["MistralForSequenceClassification"]})
    )
    with pytest.raises(UnsupportedError, match="is not a causal language model"):
        open_checkpoint(model)
