"""Which engines load a checkpoint: files that qwenq wrote, and files whose settings each rule is about."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline import run
from tiny_families import write_calibration, write_family
from tiny_published import FAMILIES, write_published

from qwenq.errors import UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.publishing.engines import ENGINES, GptqFolder, Verdict, engine_verdicts, read_gptq_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def quantised(tmp_path: Path, family: str = "qwen3", **settings: Any) -> GptqFolder:
    if family in FAMILIES:
        model = write_published(tmp_path / "m", family)
        settings["calibration"] = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    else:
        model = write_family(tmp_path / "m", family)
    run(model, tmp_path / "out", **settings)
    return read_gptq_folder(open_checkpoint(tmp_path / "out"))


def changed(folder: GptqFolder, leaf: str, **settings: Any) -> GptqFolder:
    """The same, but modules of that name have other settings."""
    modules = {
        name: replace(module, quant=replace(module.quant, **settings)) if name.endswith(leaf) else module
        for name, module in folder.modules.items()
    }
    return replace(folder, modules=modules)


def verdict(folder: GptqFolder, engine: str, gpus: int = 1) -> Verdict:
    (found,) = engine_verdicts(folder, [engine], [gpus])
    return found


def reasons(folder: GptqFolder, engine: str, gpus: int = 1) -> str:
    return "; ".join(problem.reason for problem in verdict(folder, engine, gpus).problems)


def test_a_dense_int4_loads_everywhere(tmp_path: Path) -> None:
    folder = quantised(tmp_path)
    assert [v.engine for v in engine_verdicts(folder)] == list(ENGINES)
    assert all(v.loads for v in engine_verdicts(folder))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next"])
def test_published_families_load_where_they_can(tmp_path: Path, family: str) -> None:
    folder = quantised(tmp_path, family)
    for engine in ("vllm", "sglang", "gptqmodel"):
        assert verdict(folder, engine).loads, reasons(folder, engine)
    assert not verdict(folder, "transformers").loads  # it has experts, or modules of two settings


def test_free_zero_points_load_in_gptqmodel_alone(tmp_path: Path) -> None:
    folder = quantised(tmp_path, sym=False, any_engine=True)
    assert [v.engine for v in engine_verdicts(folder) if v.loads] == ["transformers", "gptqmodel"]
    assert "free zero points" in reasons(folder, "vllm")
    old = replace(folder, quant=replace(folder.quant, checkpoint_format="gptq"))
    assert not verdict(old, "gptqmodel").loads


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 16}, "groups of 16; it takes 32, 64, 128 and whole rows"),
        ({"bits": 2}, "2 bits; it takes 4 and 8"),
        ({"desc_act": True}, "activation order"),
    ],
)
def test_settings_that_no_kernel_takes_are_named(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    folder = changed(quantised(tmp_path), "down_proj", **settings)
    for engine in ("vllm", "sglang"):
        assert said in reasons(folder, engine)
        assert "3 modules have" in reasons(folder, engine)
    assert verdict(folder, "gptqmodel").loads


def test_whole_rows_in_activation_order_load(tmp_path: Path) -> None:
    folder = changed(quantised(tmp_path), "_proj", desc_act=True, group_size=-1)
    assert verdict(folder, "vllm").loads


def test_parts_of_a_fused_layer_have_one_setting(tmp_path: Path) -> None:
    folder = quantised(tmp_path)
    assert "model.layers.0.self_attn.qkv_proj and 2 more have different settings" in reasons(
        changed(folder, "q_proj", bits=8), "vllm"
    )
    modules = {n: m for n, m in folder.modules.items() if n != "model.layers.1.mlp.up_proj"}
    partly = replace(folder, modules=modules, plain=("model.layers.1.mlp.up_proj",))
    assert "of model.layers.1.mlp.gate_up_proj some parts are quantised" in reasons(partly, "vllm")


def test_rules_that_match_the_files_names_only_are_found(tmp_path: Path) -> None:
    """vLLM looks its own names up: a rule for q_proj, k_proj and v_proj matches none of them."""
    folder = quantised(tmp_path, module_bits={"self_attn": 8})
    assert verdict(folder, "vllm").loads
    rule = {"bits": 8, "group_size": 32, "sym": True, "desc_act": False}
    narrow = {r"+:.*\.self_attn\.(q_proj|k_proj|v_proj|o_proj)$": rule}
    unread = replace(folder, quant=replace(folder.quant, dynamic=narrow))
    assert "dynamic has other settings for model.layers.0.self_attn.qkv_proj" in reasons(unread, "vllm")
    assert "several" in reasons(folder, "transformers")


def test_draft_layers_need_a_rule_of_their_own_in_vllm(tmp_path: Path) -> None:
    folder = quantised(tmp_path, "qwen3_5")
    drafts = replace(folder, names=(*folder.names, "mtp.layers.0.mlp.up_proj.weight"))
    rules = {key: value for key, value in folder.quant.dynamic.items() if "mtp" not in key}
    without = replace(drafts, quant=replace(folder.quant, dynamic=rules))
    assert "-:.*mtp.*" in reasons(without, "vllm")
    named = replace(drafts, quant=replace(folder.quant, dynamic={"-:.*mtp.*": {}, **rules}))
    assert verdict(named, "vllm").loads


def test_sglang_needs_a_rule_for_every_unquantised_layer(tmp_path: Path) -> None:
    folder = quantised(tmp_path, module_bits={"o_proj": 16})
    assert verdict(folder, "sglang").loads
    bare = replace(folder, quant=replace(folder.quant, dynamic={}))
    assert "no negative rule for model.layers.0.self_attn.o_proj and 2 more" in reasons(bare, "sglang")
    assert verdict(bare, "vllm").loads  # it asks the files


def experts_of_16_bits(tmp_path: Path, group_size: int | str = 32) -> GptqFolder:
    """A mixture whose experts, 96 wide, are as they were."""
    model = write_published(tmp_path / "m", "qwen3_moe", hidden_size=128, moe_intermediate_size=96)
    calibration = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    settings = {"group_size": group_size, "module_bits": {"experts": 16}}
    run(model, tmp_path / "out", calibration=calibration, **settings)
    return read_gptq_folder(open_checkpoint(tmp_path / "out"))


def in_groups(folder: GptqFolder, size: int) -> GptqFolder:
    return replace(changed(folder, "_proj", group_size=size), quant=replace(folder.quant, group_size=size))


def test_experts_apart_need_a_width_of_whole_groups_in_vllm(tmp_path: Path) -> None:
    """With others it takes another path, for which ``dynamic`` is not looked up."""
    folder = experts_of_16_bits(tmp_path)
    assert verdict(in_groups(folder, 32), "vllm").loads
    assert verdict(in_groups(folder, -1), "vllm").loads
    (problem,) = verdict(in_groups(folder, 64), "vllm").problems
    assert problem.reason == (
        "experts are 96 wide, no whole number of groups of 64: then it passes over dynamic, by which "
        "model.layers.0.mlp.experts and 1 more differ from the common settings"
    )
    assert problem.remedy == "use --group-size 32"
    (problem,) = verdict(in_groups(folder, 32), "vllm", 2).problems
    assert "experts are 48 wide on each GPU, no whole number of groups of 32" in problem.reason
    assert problem.remedy == "give experts the bits of --bits"


def test_such_experts_are_refused_before_any_work(tmp_path: Path) -> None:
    """Neither server would load them, and groups of 64 are the largest that divide all other widths."""
    with pytest.raises(UsageError, match="experts are 96 wide, no whole number of groups of 64") as caught:
        experts_of_16_bits(tmp_path, "auto")
    assert "use --group-size 32; or add --any-engine" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_experts_apart_need_a_model_of_whole_tiles_in_vllm(tmp_path: Path) -> None:
    folder = quantised(tmp_path, "qwen3_moe")
    assert verdict(folder, "vllm").loads, "experts that are as all others are load on either path"
    apart = changed(folder, "_proj", bits=8)
    rule = {"bits": 8, "group_size": 32, "sym": True, "desc_act": False}
    apart = replace(apart, quant=replace(apart.quant, dynamic={"+:.*": rule}))
    assert "the model is 64 wide, no multiple of 128: then it passes over dynamic" in reasons(apart, "vllm")
    config = {**folder.config, "hidden_size": 128}
    assert verdict(replace(apart, config=config), "vllm").loads


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_have_the_common_settings_in_sglang(tmp_path: Path, stacked: bool) -> None:
    """Draft layers do not count: those in ``mtp``, and those behind the last layer."""
    folder = experts_of_16_bits(tmp_path)
    if stacked:
        names = [f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 1)]
        drafts = ["mtp.layers.0.mlp.experts.down_proj", "model.layers.2.mlp.experts.down_proj"]
        folder = replace(folder, names=(*names, *drafts), plain=())
    assert reasons(folder, "sglang") == (
        "it passes over dynamic for experts, by which model.layers.0.mlp.experts and 1 more differ from the "
        "common settings"
    )
    apart = changed(quantised(tmp_path / "whole", "qwen3_moe"), "down_proj", bits=8)
    assert "it passes over dynamic for experts" in reasons(apart, "sglang")


def test_groups_that_gpus_cannot_share_are_named_with_a_remedy(tmp_path: Path) -> None:
    folder = quantised(tmp_path, "qwen2", group_size=32)
    (problem,) = verdict(folder, "vllm", 2).problems
    assert problem.reason == "the 96 inputs of down_proj in groups of 32 cannot be split among 2 GPUs"
    assert problem.remedy == "use fewer GPUs"
    wide = replace(folder, modules={n: replace(m, columns=m.columns * 2) for n, m in folder.modules.items()})
    assert verdict(wide, "vllm", 2).loads
    (problem,) = verdict(changed(wide, "down_proj", group_size=64), "vllm", 2).problems
    assert problem.remedy == "use --group-size 32"
    assert "4 heads cannot be shared by 3 GPUs" in reasons(folder, "vllm", 3)
    assert len(engine_verdicts(folder, ["transformers"], [1, 2, 4])) == 1  # it splits no model


def test_qwen_v1_is_converted_first(tmp_path: Path) -> None:
    folder = quantised(tmp_path)
    first = replace(folder, config={**folder.config, "model_type": "qwen"})
    (problem,) = verdict(first, "vllm").problems
    assert "qwenq convert" in problem.remedy


def test_an_unquantised_model_and_an_unknown_engine_are_refused(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    with pytest.raises(UsageError, match="not quantised"):
        read_gptq_folder(open_checkpoint(model))
    with pytest.raises(UsageError, match="'exllama' are not known"):
        engine_verdicts(quantised(tmp_path / "x"), ["exllama"])


def test_the_rules_read_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantised(tmp_path)
    out = tmp_path / "out"
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert folder.quant.bits == settings["bits"]
    checkpoint = open_checkpoint(out)
    monkeypatch.setattr(type(checkpoint.published), "read", lambda *_: pytest.fail("a tensor was read"))
    assert all(v.loads for v in engine_verdicts(read_gptq_folder(checkpoint), ["vllm"]))


@pytest.mark.parametrize(
    ("settings", "noted"), [({}, True), ({"bits": 8}, False), ({"group_size": 32}, False)]
)
def test_whole_rows_of_int4_have_a_note_on_gptqmodels_cpu_kernel(
    tmp_path: Path, settings: dict[str, Any], noted: bool
) -> None:
    folder = quantised(tmp_path, **({"group_size": -1} | settings))
    for engine in ("gptqmodel", "transformers"):
        assert any("whole rows" in line for line in verdict(folder, engine).notes) == noted


@pytest.mark.parametrize(
    ("family", "settings", "noted"),
    [
        ("qwen3", {}, "its CPU build runs Int4 only on CPUs with AVX-512"),
        ("qwen3", {"bits": 8}, "its CPU build takes Int4 only, and layers left in 16 bits"),
        ("qwen3", {"module_bits": {"self_attn": 8}}, "its CPU build takes Int4 only"),
        ("qwen3_moe", {}, "its CPU build runs Int4 experts only on CPUs with AMX"),
        ("qwen3_5_text", {}, "its class of this model imports torchvision"),
        ("qwen3_vl", {}, "its class of this model imports torchvision"),
    ],
)
def test_what_vllm_needs_beside_a_file_is_noted(
    tmp_path: Path, family: str, settings: dict[str, Any], noted: str
) -> None:
    notes = verdict(quantised(tmp_path, family, **settings), "vllm").notes
    assert any(noted in line for line in notes)
    assert any("torchvision" in line for line in notes) == (family != "qwen3" and family != "qwen3_moe")
