"""GPTQ folders: published configs, the plain view, validation, and published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models.plain_qwen_v1 import MemorySource
from torch import Tensor

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.gptq_config import CheckpointFormat, QuantConfig
from qwenq.models.gptq_format import (
    DequantisedSource,
    dequantise,
    pack,
    quantised_modules,
    read_packed,
    validate_quantised,
)

V1 = {
    "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False,
    "sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
QWEN2_5 = {
    "batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True,
    "damp_percent": 0.01, "dataset": None, "desc_act": False, "exllama_config": {"version": 1},
    "group_size": 128, "max_input_length": None, "model_seqlen": None,
    "module_name_preceding_first_block": None, "modules_in_block_to_quantize": None, "pad_token_id": None,
    "quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False,
    "use_exllama": True,
}  # fmt: skip
QWEN3 = {
    "bits": 8, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False, "pack_dtype": "int32",
    "meta": {}, "quant_method": "gptq", "dynamic": {}, "checkpoint_format": "gptq",
}  # fmt: skip


def packed_model(
    quant: QuantConfig, stored: CheckpointFormat | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Two quantised modules among plain tensors, with biases."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.ones(4, 64).half()}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        integers = torch.randint(0, 2**quant.bits, (32, 64), generator=generator, dtype=torch.uint8)
        groups = quant.groups(64)
        if quant.sym:
            zeros = torch.full((32, groups), 2 ** (quant.bits - 1), dtype=torch.uint8)
        else:
            zeros = torch.randint(1, 2**quant.bits, (32, groups), generator=generator, dtype=torch.uint8)
        scales = torch.rand(32, groups, generator=generator)
        packed = pack(integers, scales, zeros, quant.bits, stored or quant.checkpoint_format)
        tensors |= {**packed.tensors(name), f"{name}.bias": torch.zeros(32).half()}
    return {**tensors, "model.norm.weight": torch.ones(64).half()}


@pytest.mark.parametrize(
    ("published", "bits"), [(V1, 4), (QWEN2_5, 4), (QWEN3, 8)], ids=["v1", "qwen2.5", "qwen3"]
)
def test_published_configs_are_read(published: dict[str, Any], bits: int) -> None:
    assert QuantConfig.read({"model_type": "qwen2", "quantization_config": published}) == QuantConfig(
        bits=bits
    )
    assert QuantConfig.read(published) == QuantConfig(bits=bits)


def test_settings_survive_both_files() -> None:
    quant = QuantConfig(8, 64, False, True, True, False, 0.05, "gptq_v2", True)
    assert QuantConfig.read({"quantization_config": quant.to_config_json()}) == quant
    plain = QuantConfig(8, -1, False, False, True, False, 0.05)
    assert QuantConfig.read(plain.to_quantize_config_json()) == plain


def test_quantize_config_holds_autogptqs_nine_keys_as_published() -> None:
    written = QuantConfig().to_quantize_config_json()
    assert {key: written[key] for key in V1} == V1
    assert set(written) - set(V1) == {"quant_method", "checkpoint_format"}


def test_transformers_takes_the_config() -> None:
    from transformers import GPTQConfig

    theirs = GPTQConfig.from_dict(QuantConfig(8, 64, sym=False, damp_percent=0.05).to_config_json())
    assert (theirs.bits, theirs.group_size, theirs.sym, theirs.desc_act) == (8, 64, False, False)
    assert (theirs.damp_percent, theirs.format) == (0.05, "gptq")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"quant_method": "awq"}, UnsupportedError, "awq"),
        ({"bits": 5}, UnsupportedError, "bits is 5; only 2, 3, 4, 8"),
        ({"bits": True}, UnsupportedError, "bits is True"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin"),
        ({"format": "bitblas"}, UnsupportedError, "bitblas"),
        ({"pack_dtype": "int8"}, UnsupportedError, "pack_dtype"),
        ({"dynamic": {"-:(": {}}}, ModelError, "dynamic"),
        ({"group_size": 0}, ModelError, "group_size is 0"),
        ({"group_size": "128"}, ModelError, "group_size"),
        ({"sym": 1}, ModelError, "sym is 1"),
    ],
)
def test_configs_that_cannot_be_read_say_why(
    change: dict[str, Any], error: type[ModelError], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        QuantConfig.read({"quantization_config": {**V1, **change}})
    assert raised.value.hint
    assert raised.value.where


def test_other_methods_and_plain_models_have_different_errors() -> None:
    with pytest.raises(UnsupportedError, match="fp8"):
        QuantConfig.read({"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ModelError, match="names no GPTQ settings"):
        QuantConfig.read({"model_type": "qwen2"})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_gptq_folder_reads_like_a_plain_one(
    bits: int, group_size: int, stored: CheckpointFormat, sym: bool
) -> None:
    quant = QuantConfig(bits, group_size, sym, checkpoint_format=stored)
    packed = MemorySource(packed_model(quant))
    assert validate_quantised(packed, quant) == quantised_modules(packed)
    plain = DequantisedSource(packed, quant, torch.bfloat16)
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert list(plain.names()) == [  # the zero bias of down_proj is gone, q_proj's stays
        "model.embed_tokens.weight", f"{q}.weight", f"{q}.bias", f"{down}.weight", "model.norm.weight",
    ]  # fmt: skip
    for name in plain.names():
        tensor, info = plain.read(name), plain.info(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
    wanted = dequantise(read_packed(packed, q, quant), bits, stored)
    assert torch.equal(plain.read(f"{q}.weight"), wanted.bfloat16())
    assert DequantisedSource(packed, quant).info(f"{q}.weight").dtype == torch.float16


def test_a_bias_that_is_not_zero_is_shown() -> None:
    quant = QuantConfig(4, 32)
    tensors = packed_model(quant)
    tensors["model.layers.0.mlp.down_proj.bias"][3] = 1
    assert "model.layers.0.mlp.down_proj.bias" in DequantisedSource(MemorySource(tensors), quant).names()


def test_a_missing_g_idx_is_trivial_unless_columns_were_reordered() -> None:
    quant = QuantConfig(4, 32)
    whole = packed_model(quant)
    without = {name: tensor for name, tensor in whole.items() if not name.endswith("g_idx")}
    module = "model.layers.0.mlp.down_proj"
    assert torch.equal(
        DequantisedSource(MemorySource(without), quant).read(f"{module}.weight"),
        DequantisedSource(MemorySource(whole), quant).read(f"{module}.weight"),
    )
    with pytest.raises(ModelError, match="lacks g_idx"):
        validate_quantised(MemorySource(without), QuantConfig(4, 32, desc_act=True))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_tensor_is_named_with_its_module(part: str) -> None:
    tensors = packed_model(QuantConfig(4, 32))
    del tensors[f"model.layers.0.mlp.down_proj.{part}"]
    for check in (validate_quantised, lambda s, q: read_packed(s, "model.layers.0.mlp.down_proj", q)):
        with pytest.raises(ModelError, match=f"lacks {part}") as raised:
            check(MemorySource(tensors), QuantConfig(4, 32))
        assert raised.value.where == "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("wrong", [QuantConfig(8, 32), QuantConfig(4, 64), QuantConfig(4, -1)])
def test_settings_that_are_not_those_of_the_weights_are_refused(wrong: QuantConfig) -> None:
    with pytest.raises(ModelError, match=f"bits {wrong.bits} and group_size {wrong.group_size}"):
        validate_quantised(MemorySource(packed_model(QuantConfig(4, 32))), wrong)


def test_asymmetric_zero_points_under_a_symmetric_tag_are_refused() -> None:
    tensors = packed_model(QuantConfig(4, 32, sym=False))
    with pytest.raises(ModelError, match="zero points run from"):
        validate_quantised(MemorySource(tensors), QuantConfig(4, 32))


def test_groups_that_do_not_exist_are_refused() -> None:
    quant = QuantConfig(4, 32)
    tensors = packed_model(quant)
    tensors["model.layers.0.mlp.down_proj.g_idx"][5] = 2
    with pytest.raises(ModelError, match="from 0 to 2, but there are 2 groups"):
        validate_quantised(MemorySource(tensors), quant)


def test_a_gptq_config_over_plain_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="no tensor is named"):
        validate_quantised(MemorySource({"a.weight": torch.ones(2)}), QuantConfig())
