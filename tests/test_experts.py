"""Mixtures of experts: layouts on disk, experts without tokens, coverage, runs that resume or are shared."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, manifest_of, recipe_for, run
from safetensors.torch import load_file
from teams import launcher
from tiny_families import write_calibration
from tiny_published import fused, rewrite, write_published

from qwenq.errors import ModelError, StorageError
from qwenq.events import Advance, Event
from qwenq.gptq.experts import PULL
from qwenq.quantization import quantize
from qwenq.reporting.experts import POLICY
from qwenq.runtime.engine import load


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def hashes(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return found | {"modules": json.dumps(manifest_of(folder)["modules"])}


@pytest.mark.parametrize(
    ("family", "transposed"),
    [
        ("qwen3_moe", False),
        ("qwen3_moe", True),
        *((family, False) for family in ("olmoe", "qwen2_moe", "glm4_moe", "deepseek_v3")),  # by inspection
    ],
)
def test_fused_experts_give_the_same_integers_as_experts_apart(
    tmp_path: Path, family: str, transposed: bool
) -> None:
    apart = write_published(tmp_path / "apart", family)
    together = rewrite(write_published(tmp_path / "fused", family), partial(fused, transposed=transposed))
    calibration = write_calibration(apart, tmp_path / "tokens.safetensors", samples=8)
    for model in (apart, together):
        run(model, tmp_path / f"{model.name}-out", calibration=calibration)
    first, second = (load_file(tmp_path / f"{n}-out" / "model.safetensors") for n in ("apart", "fused"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "model.layers.1.mlp.experts.3.down_proj.qweight" in first


def test_both_orientations_of_a_vision_mixtures_experts_are_one_model(tmp_path: Path) -> None:
    """Qwen3-VL-MoE is published as [expert, in, out]; transformers 5 saves [expert, out, in]."""

    def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        fused_names = (".gate_up_proj", ".down_proj")
        return {name: value.mT if name.endswith(fused_names) else value for name, value in tensors.items()}

    saved, published = (
        write_published(tmp_path / name, "qwen3_vl_moe", moe_intermediate_size=96)
        for name in ("saved", "published")
    )
    rewrite(published, turned)
    stored = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    shapes = [list(load_file(model / "model.safetensors")[stored].shape) for model in (saved, published)]
    assert shapes == [[4, 192, 64], [4, 64, 192]]
    tokens = write_calibration(saved, tmp_path / "t.safetensors", samples=8)
    for model in (saved, published):
        run(model, tmp_path / f"{model.name}-out", calibration=tokens)
    first, second = (load_file(tmp_path / f"{n}-out" / "model.safetensors") for n in ("saved", "published"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "model.language_model.layers.1.mlp.experts.3.down_proj.qweight" in first


@pytest.mark.parametrize(
    ("family", "count"),
    [("qwen3_moe", "num_experts"), ("mixtral", "num_local_experts"), ("deepseek_v3", "n_routed_experts")],
)
def test_experts_that_saw_no_token_are_quantised_for_those_of_the_block(
    tmp_path: Path, family: str, count: str
) -> None:
    """Eight tokens, sixteen experts, one a token: at least eight see nothing."""
    model = write_published(tmp_path / "m", family, **{count: 16, "num_experts_per_tok": 1})
    calibration = write_calibration(model, tmp_path / "tokens.safetensors", samples=1, seq_len=8, held_out=4)
    result = run(model, tmp_path / "out", calibration=calibration)
    manifest = manifest_of(tmp_path / "out")
    for tokens in manifest["expert_tokens"].values():
        assert len(tokens) == 16
        assert sum(tokens) == 8
    unseen = [stats for stats in manifest["modules"].values() if stats.get("tokens") == 0]
    assert len(unseen) >= 2 * 8 * 3
    assert all(0 < stats["error"] < stats["rtn_error"] for stats in unseen), "no expert is rounded to nearest"
    assert result.check is not None


def test_coverage_and_what_is_left_alone_are_in_the_manifest(tmp_path: Path) -> None:
    model, ear = write_published(tmp_path / "m", "qwen3_moe"), Recorder()
    run(model, tmp_path / "out", ear)
    manifest = manifest_of(tmp_path / "out")
    assert {key: len(value) for key, value in manifest["expert_tokens"].items()} == {
        f"model.layers.{layer}.mlp.experts": 4 for layer in range(2)
    }
    assert all(sum(tokens) == 2 * 4 * 32 for tokens in manifest["expert_tokens"].values())
    assert set(manifest["not_quantised"]) == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}
    assert len(manifest["modules"]) == 2 * (4 + 3 * 4)
    counts = [tokens for layer in manifest["expert_tokens"].values() for tokens in layer]
    said = f"calibration gave each of 8 experts {min(counts)} to {max(counts)} tokens"
    assert sum(line.startswith(said) for line in ear.lines) == 1
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"### Experts\n\nC{said[1:]}" in card
    assert "none is rounded to nearest." in card
    first = manifest["expert_tokens"]["model.layers.0.mlp.experts"]
    assert f"\n| 0 | 4 | {min(first)} | {sorted(first)[1]} | {max(first)} | {first.count(0)} |\n" in card
    (said,) = [line for line in ear.lines if line.startswith("not quantised")]
    assert said == "not quantised: mlp.gate in 2 layers (the router: a few rows that choose the experts)"


def test_the_policy_that_cards_state_is_the_one_in_use() -> None:
    assert PULL == 1 / 4
    assert "as a quarter of its input width" in POLICY


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "deepseek_v3"])
def test_a_run_that_resumes_ends_as_a_whole_one(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "m", family)
    recipe = recipe_for(model)
    quantize(recipe, tmp_path / "whole", Recorder(), device="cpu")

    class Stopped(Recorder):
        def __call__(self, event: Event) -> None:
            if isinstance(event, Advance) and event.result is not None:
                raise StorageError("stopped after a layer")

    with pytest.raises(StorageError):
        quantize(recipe, tmp_path / "out", Stopped(), device="cpu")
    assert quantize(recipe, tmp_path / "out", Recorder(), device="cpu").resumed_layers == 1
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_two_processes_write_the_same_bits_as_one(tmp_path: Path) -> None:
    """Sixteen experts and batches of 32 tokens: some experts have tokens on one rank alone, some on none."""
    with launcher(tmp_path, ["torch.distributed"]) as launch:
        model = write_published(
            tmp_path / "m", "qwen3_moe", num_experts=16, num_experts_per_tok=1, max_position_embeddings=2048
        )
        tokens = write_calibration(model, tmp_path / "t.safetensors", samples=2, seq_len=2048, held_out=1)
        made = []
        for world in (1, 2):
            argv = ["quantize", model, "--calibration", tokens, "--out", tmp_path / f"out{world}"]
            ended = launch(world, *argv, "--dtype", "float32")
            assert ended.statuses == [0] * world, ended.shown
            made.append(hashes(tmp_path / f"out{world}"))
    assert made[0] == made[1]


def without(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


def cut(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {name: tensors[name][:-8]}


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (partial(without, EXPERT), f"the tensor {EXPERT} is missing"),
        (partial(cut, EXPERT), rf"{EXPERT} has shape \(24, 64\), config.json asks for \(32, 64\)"),
        (
            lambda tensors: tensors | {ROUTER: torch.cat([tensors[ROUTER], tensors[ROUTER]])},
            rf"{ROUTER} has shape \(8, 64\), config.json asks for \(4, 64\)",
        ),
        (
            lambda tensors: tensors | {EXPERT.replace(".2.", ".4."): tensors[EXPERT].clone()},
            "experts.4.up_proj.weight has no place in this architecture",
        ),
    ],
)
def test_experts_that_do_not_fit_the_config_are_refused_by_name(
    tmp_path: Path, change: Any, said: str
) -> None:
    model = rewrite(write_published(tmp_path / "m", "qwen3_moe"), change)
    with pytest.raises(ModelError, match=said):
        run(model, tmp_path / "out")


def test_rows_of_a_batch_are_rows_alone(tmp_path: Path) -> None:
    engine = load(
        write_published(tmp_path / "m", "qwen3_moe"), device="cpu", dtype="float32", engine="transformers"
    )
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7], [4]]
    together = engine.logits(prompts)
    for prompt, found in zip(prompts, together, strict=True):
        torch.testing.assert_close(found, engine.logits([prompt])[0], atol=1e-5, rtol=0)
