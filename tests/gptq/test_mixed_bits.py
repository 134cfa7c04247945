"""Bits chosen by measured sensitivity: the knapsack, what is measured, the folder, what goes wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, manifest_of, run
from safetensors.torch import load_file
from tiny_families import write_calibration, write_family
from tiny_published import transformers_of, write_dequantised, write_published
from torch.nn import functional

from qwenq.compute.grid import search_grid
from qwenq.errors import UsageError
from qwenq.gptq import mixed_bits
from qwenq.gptq.mixed_bits import Group, choose_bits, groups_of, measure, sample_of
from qwenq.gptq.settings import Settings
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.publishing.engines import engine_verdicts, read_gptq_folder
from qwenq.recipe import QuantizeRecipe
from qwenq.runtime.engine import load
from qwenq.stopping import Terminated

IDS = list(range(3, 43))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def group(index: int, cost: int) -> Group:
    return Group(index, "mlp.down_proj", ("mlp.down_proj",), 2 * cost, 100, 100 + cost)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_within_the_size_leaves_less(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs = torch.randint(1, 12, (9,), generator=draw).tolist()
    kl = torch.rand(9, generator=draw).tolist()
    groups = [group(index, 8 * cost) for index, cost in enumerate(costs)]
    for spare in (0, 7, 8, 60, 8 * sum(costs) // 2, 8 * sum(costs)):
        found = choose_bits(groups, kl, 900 + spare, 50, 64)
        remaining = min(
            sum(k for k, many in zip(kl, choice, strict=True) if not many)
            for choice in product((False, True), repeat=9)
            if sum(8 * cost for cost, many in zip(costs, choice, strict=True) if many) <= spare
        )
        assert found.remaining == pytest.approx(remaining)
        assert found.nbytes <= 50 + 900 + spare
    assert [size for size, _ in found.curve] == sorted(size for size, _ in found.curve)
    assert found.curve[0] == (950, pytest.approx(sum(kl)))
    assert found.curve[-1] == (950 + 8 * sum(costs), pytest.approx(0))


def test_a_coarse_count_of_bytes_stays_within_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed_bits, "CELLS", 10)
    found = choose_bits([group(0, 97), group(1, 89), group(2, 101)], [0.3, 0.2, 0.1], 300 + 200, 0, 64)
    assert found.chosen == (True, False, False) and found.nbytes <= 500


def decoder_and_groups(model: Path) -> tuple[BlockwiseDecoder, Settings, list[Group]]:
    decoder = BlockwiseDecoder(open_checkpoint(model), torch.device("cpu"), torch.float32)
    settings = replace(Settings.from_recipe(QuantizeRecipe()), group_size=32)
    return decoder, settings, groups_of(decoder, settings)


def test_groups_are_the_layers_of_engines(tmp_path: Path) -> None:
    _, _, groups = decoder_and_groups(write_published(tmp_path / "m", "qwen3_moe"))
    assert [each.name for each in groups if each.layer == 0] == [
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.experts",
    ]
    assert "mlp.experts.1.up_proj" in groups[2].modules


def test_the_sensitivity_is_the_divergence_of_the_model_with_that_group_rounded(tmp_path: Path) -> None:
    """Held against transformers' model, whose weights are rounded one group at a time."""
    model = write_family(tmp_path / "m", "qwen2")
    decoder, settings, groups = decoder_and_groups(model)
    tokens = torch.arange(3, 67).view(2, 32)
    found = measure(decoder, tokens, settings, groups, tmp_path / "s.json", {})
    reference = transformers_of(model)
    with torch.inference_mode():
        base = reference(input_ids=tokens).logits.log_softmax(-1)
        for each, value in zip(groups, found, strict=True):
            inner = reference.model.layers[each.layer]
            plain, seen = {}, {}
            for name in each.modules:
                linear = inner.get_submodule(name)
                plain[name] = linear.weight.data.clone()
                hook = linear.register_forward_pre_hook(
                    lambda _, args, to=(seen, name): to[0].update(
                        {to[1]: args[0].flatten(0, 1).square().mean(0)}
                    )
                )
                reference(input_ids=tokens)
                hook.remove()
                grid = search_grid(plain[name], seen[name], 4, 32, sym=True, search="hessian")
                linear.weight.data = grid.values(grid.integers(plain[name]))
            rounded = reference(input_ids=tokens).logits.log_softmax(-1)
            for name, weight in plain.items():
                inner.get_submodule(name).weight.data = weight
            kl = functional.kl_div(rounded, base, reduction="sum", log_target=True) / tokens.numel()
            assert value == pytest.approx(float(kl), rel=1e-2, abs=1e-7)


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, settings, groups = decoder_and_groups(write_family(tmp_path / "m", "qwen3"))
    tokens = torch.arange(3, 67).view(2, 32)
    whole = measure(decoder, tokens, settings, groups, tmp_path / "whole.json", {"run": 1})

    def stopped() -> None:
        raise Terminated

    monkeypatch.setattr(mixed_bits, "stop_here", stopped)
    file = tmp_path / "s.json"
    with pytest.raises(Terminated):
        measure(decoder, tokens, settings, groups, file, {"run": 1})
    assert len(json.loads(file.read_text())["kl"]) == 4  # of the first block
    monkeypatch.undo()
    rounded: list[int] = []
    run_block = mixed_bits._run_with_each_rounded

    def counted(decoder: Any, index: int, hidden: Any, own: Any, settings: Any) -> Any:
        rounded.append(len(own))
        return run_block(decoder, index, hidden, own, settings)

    monkeypatch.setattr(mixed_bits, "_run_with_each_rounded", counted)
    assert measure(decoder, tokens, settings, groups, file, {"run": 1}) == whole
    assert rounded == [0, 4, 4]
    assert measure(decoder, tokens, settings, groups, file, {"run": 1}) == whole and len(rounded) == 3
    measure(decoder, tokens, settings, groups, file, {"run": 2})  # another run's figures count for nothing
    assert rounded[3:] == [4, 4, 4]


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_a_folder_within_its_size_runs_as_it_is_dequantised(tmp_path: Path, family: str) -> None:
    model = write_family(tmp_path / "m", family)
    ear = Recorder()
    run(model, tmp_path / "out", ear, budget=5.5)
    mixed = manifest_of(tmp_path / "out")["mixed_bits"]
    bits = {each["name"]: each["bits"] for each in mixed["groups"]}
    assert set(bits.values()) == {4, 8}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, width in bits.items():
        module = re.sub("qkv_proj", "q_proj", name.replace("gate_up_proj", "up_proj"))
        qweight, g_idx = tensors[f"{module}.qweight"], tensors[f"{module}.g_idx"]
        assert qweight.shape[0] * 32 // g_idx.shape[0] == width, name
    packed = [name for name in tensors if re.search(r"\.(qweight|qzeros|scales|g_idx)$", name)]
    elements = sum(
        tensors[name].numel() * 32 // (8 if bits[_group_of(name)] == 8 else 4)
        for name in packed
        if name.endswith(".qweight")
    )
    assert sum(tensors[name].nbytes for name in packed) * 8 / elements <= 5.5
    assert sum(tensor.nbytes for tensor in tensors.values()) == mixed["bytes"]
    assert any("groups of linear layers have 8 bits" in line for line in ear.lines)
    reference = transformers_of(write_dequantised(tmp_path / "out", tmp_path / "plain"))
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([IDS])).logits[0]
    for engine in ("fast", "transformers"):
        found = load(tmp_path / "out", device="cpu", dtype="float32", engine=engine).logits([IDS])[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    verdicts = {
        each.engine: each.loads
        for each in engine_verdicts(read_gptq_folder(open_checkpoint(tmp_path / "out")))
    }
    assert verdicts["vllm"] and verdicts["gptqmodel"]


def _group_of(name: str) -> str:
    module = name.rpartition(".")[0]
    return re.sub(r"\.(q|k|v)_proj$", ".qkv_proj", re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", module))


def test_more_bytes_come_nearer_to_the_base(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    values = []
    for budget in (5.2, 7.0, 9.1):
        done = run(model, tmp_path / f"out{budget}", budget=budget)
        assert done.check is not None
        values.append(done.check.kl.value)
    assert values[0] > 1.5 * values[1] > 3 * values[2] > 0


def test_experts_of_a_block_are_chosen_together(tmp_path: Path) -> None:
    model = write_published(tmp_path / "m", "qwen3_moe")
    tokens = write_calibration(model, tmp_path / "t.safetensors")
    run(model, tmp_path / "out", calibration=tokens, budget=8.0, module_bits={"self_attn": 4})
    dynamic = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert any(re.search(r"layers\\\.\(\d\)\\\.mlp\\\.experts", rule) for rule in dynamic), dynamic
    load(tmp_path / "out", device="cpu", dtype="float32", engine="transformers").logits([IDS])


def test_a_fixed_rule_stays_and_counts(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    run(model, tmp_path / "out", budget=6.5, module_bits={"o_proj": 8})
    mixed = manifest_of(tmp_path / "out")["mixed_bits"]
    assert not any("o_proj" in each["name"] for each in mixed["groups"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.o_proj.qweight"].shape[0] == 64 * 8 // 32
    assert sum(tensor.nbytes for tensor in tensors.values()) == mixed["bytes"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 4.5}, "too small"),
        ({"budget": 9.5}, "more than 8 bits"),
        ({"budget": "1GB"}, "more than 8 bits"),
        ({"budget": "much"}, "is not a size"),
        ({"budget": 5.0, "bits": 8}, "--bits is 8"),
        ({"budget": 6.0, "module_bits": {"proj": 8}}, "no bits are left to choose"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        run(write_family(tmp_path / "m", "qwen3"), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial")), "before any text is written or anything measured"


def test_the_text_of_the_check_is_not_what_bits_are_chosen_by(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    file = write_calibration(model, tmp_path / "t.safetensors", samples=6)
    tensors = load_file(file)
    sample = {tuple(row) for row in sample_of(tensors["tokens"], torch.device("cpu")).tolist()}
    assert len(sample) == 6 and not sample & {tuple(row) for row in tensors["held_out"].tolist()}
