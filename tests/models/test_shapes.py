"""Sizes against transformers' own modules, published counts, and byte totals of real files."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.models import catalogue
from qwenq.models.shapes import ModelShape

V1_7B = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
V1_7B_OF_AUGUST_2023 = {
    "model_type": "qwen",
    "n_embd": 4096,
    "ffn_hidden_size": 22016,
    "kv_channels": 128,
    "n_positions": 6144,
    "n_head": 32,
    "n_layer": 32,
    "seq_length": 2048,
    "vocab_size": 151936,
    "padded_vocab_size": 151936,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = MIXTURE | {"shared_expert_intermediate_size": 40}
HYBRID: dict[str, Any] = {
    "num_hidden_layers": 5,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}


def tensors_of_transformers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is published: a tied head is left out, and experts are apart."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found = {}
    for name, tensor in model.state_dict().items():
        size = tuple(tensor.shape)
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found[name] = size
            continue
        prefix, _, leaf = name.rpartition(".")
        for number in range(size[0]):
            if leaf == "down_proj":
                found[f"{prefix}.{number}.down_proj.weight"] = size[1:]
                continue
            for part in ("gate_proj", "up_proj"):
                found[f"{prefix}.{number}.{part}.weight"] = (size[1] // 2, size[2])
    return found


@pytest.mark.parametrize(
    "variant",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
        {"model_type": "qwen3"},
        {"model_type": "qwen3", "head_dim": 32},
        {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        {"model_type": "qwen3_moe", **MIXTURE},
        {"model_type": "qwen3_moe", **MIXTURE, "head_dim": 8, "attention_bias": True},
        {"model_type": "qwen3_moe", **MIXTURE, "num_hidden_layers": 4, "decoder_sparse_step": 2},
        {"model_type": "qwen3_moe", **MIXTURE, "num_hidden_layers": 3, "mlp_only_layers": [1]},
        {"model_type": "qwen3_next", **SHARED, **HYBRID},
        {"model_type": "qwen3_next", **SHARED, **HYBRID, "mlp_only_layers": [0, 3]},
        {"model_type": "qwen3_5_text", **HYBRID, "tie_word_embeddings": True},
        {"model_type": "qwen3_5_text", **HYBRID, "full_attention_interval": 2},
        {"model_type": "qwen3_5_moe_text", **SHARED, **HYBRID, "attention_bias": True},
        {
            "model_type": "qwen3_5_moe_text",
            **SHARED,
            **HYBRID,
            "layer_types": ["full_attention", *["linear_attention"] * 4],
        },
    ],
    ids=lambda variant: "-".join(map(str, variant.values())),
)
def test_tensors_are_those_of_transformers(variant: dict[str, Any]) -> None:
    config = TINY | variant
    shape = ModelShape.from_config(config)
    ours = shape.tensors()
    assert ours == tensors_of_transformers(config)
    assert shape.parameters == sum(map(prod, ours.values()))


@pytest.mark.parametrize(
    "name",
    [
        *("qwen-7b-chat", "qwen2.5-0.5b-instruct", "qwen3-4b", "smollm2-135m-instruct"),
        *("qwen3-30b-a3b", "qwen3-next-80b-a3b-instruct", "qwen3.5-9b", "qwen3.5-27b", "qwen3.5-35b-a3b"),
    ],
)
def test_real_sizes_are_those_of_transformers(name: str) -> None:
    config = catalogue.config_for(name)
    ours = ModelShape.from_config(config).tensors()
    assert ours == tensors_of_transformers(config)


def test_published_counts_and_bytes_of_qwen_v1() -> None:
    assert catalogue.entry("qwen-1.8b").shape.parameters == 1_836_828_672
    shape = ModelShape.from_config(V1_7B)
    assert shape.parameters == 7_721_324_544
    assert shape.bytes("bfloat16") == 15_442_649_088
    assert shape.bytes("float32") == 2 * shape.bytes("float16")
    assert shape == catalogue.entry("qwen-7b").shape


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("qwen3-next-80b-a3b-instruct", 79_674_391_296),
        ("qwen3.5-35b-a3b", 34_660_610_688),
        ("qwen3.5-27b", 26_895_998_464),
    ],
)
def test_known_counts_of_mixtures_and_hybrids(name: str, parameters: int) -> None:
    assert catalogue.entry(name).shape.parameters == parameters


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
def test_bytes_are_those_of_the_tensors(model_type: str) -> None:
    shape = ModelShape.from_config(TINY | SHARED | HYBRID | {"model_type": model_type})
    assert shape.bytes("bfloat16") == 2 * sum(map(prod, shape.tensors().values()))


def test_a_vision_model_is_seen_as_its_language_model() -> None:
    text = TINY | HYBRID | {"model_type": "qwen3_5_text", "tie_word_embeddings": False}
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "tie_word_embeddings": True}
    assert ModelShape.from_config(whole) == ModelShape.from_config(text | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    "missing", ["num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"]
)
def test_a_missing_size_of_experts_is_named(missing: str) -> None:
    config = TINY | SHARED | HYBRID | {"model_type": "qwen3_5_moe_text"}
    with pytest.raises(ModelError, match=r"config\.json has no"):
        ModelShape.from_config({key: value for key, value in config.items() if key != missing})


def test_draft_layers_have_the_published_number_of_tensors() -> None:
    """15 tensors in Qwen3.5-27B's files, 785 in those of 35B-A3B."""
    for name, count in (("qwen3.5-27b", 15), ("qwen3.5-35b-a3b", 785)):
        block = next(block for block in catalogue.entry(name).shape.blocks if block.attends)
        assert len(list(block.tensors())) + 4 == count  # fc and three norms


def test_gptq_byte_totals_of_qwen_7b_chat() -> None:
    shape = ModelShape.from_config(V1_7B)
    assert shape.quantised_bytes(4, 128, zero_biases=True, fused_qkv=True) == 5_860_564_992
    assert shape.quantised_bytes(8, 128, zero_biases=True, fused_qkv=True) == 9_123_864_576
    zero_biases = 32 * 2 * (4096 + 11008 + 11008 + 4096)  # o, gate, up, down; float16
    two_more_g_idx = 32 * 2 * 4096 * 4  # q, k and v have one each
    assert shape.quantised_bytes(4, 128) == 5_860_564_992 - zero_biases + two_more_g_idx


def test_both_key_sets_of_qwen_v1_say_the_same() -> None:
    new, old = ModelShape.from_config(V1_7B), ModelShape.from_config(V1_7B_OF_AUGUST_2023)
    assert old.context == 6144
    assert old.parameters == new.parameters
    assert old.ffn == 11008


def test_keys_and_values_per_token() -> None:
    assert catalogue.entry("qwen-7b").shape.kv_bytes_per_token() == 2 * 32 * 4096 * 2
    assert catalogue.entry("qwen2.5-7b-instruct").shape.kv_bytes_per_token() == 56 * 1024
    assert catalogue.entry("qwen3-0.6b").shape.kv_bytes_per_token("float32") == 2 * 28 * 8 * 128 * 4


def test_auto_group_size() -> None:
    assert catalogue.entry("qwen-7b").shape.auto_group_size() == 128
    assert catalogue.entry("smollm2-135m-instruct").shape.auto_group_size() == 64
    assert ModelShape.from_config(TINY | {"model_type": "qwen2"}).auto_group_size() == 32
    odd = ModelShape.from_config(TINY | {"model_type": "qwen2", "intermediate_size": 100})
    with pytest.raises(UsageError, match="no group size"):
        odd.auto_group_size()


@given(
    heads=st.sampled_from([2, 4, 8]),
    shared=st.sampled_from([1, 2]),
    layers=st.integers(1, 4),
    wide=st.integers(1, 5),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, -1]),
    tied=st.booleans(),
)
def test_quantised_bytes_by_hand(
    heads: int, shared: int, layers: int, wide: int, bits: int, group: int, tied: bool
) -> None:
    """The layout's definition, summed independently: words, zero points, scales, indices, biases."""
    hidden, ffn, vocab, kv = heads * 64, wide * 64, 160, heads // shared * 64
    config = {"model_type": "qwen2", "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocab}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // shared}
    config |= {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    total = (vocab * hidden * (1 if tied else 2) + hidden * (1 + 2 * layers)) * 2
    modules = [(hidden, hidden, True), (hidden, kv, True), (hidden, kv, True), (hidden, hidden, False)]
    modules += [(hidden, ffn, False), (hidden, ffn, False), (ffn, hidden, False)]
    for inputs, outputs, bias in modules:
        groups = 1 if group == -1 else inputs // group
        one = inputs * outputs * bits // 8 + groups * outputs * bits // 8 + groups * outputs * 2 + inputs * 4
        total += layers * (one + (outputs * 2 if bias else 0))
    assert ModelShape.from_config(config).quantised_bytes(bits, group) == total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "sizes of a mixtral model are not known"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "unknown"),
    ],
)
def test_other_architectures_are_not_yet_supported(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModelShape.from_config(TINY | {"model_type": "qwen2"} | change)


@pytest.mark.parametrize(
    "change",
    [{"num_key_value_heads": 3}, {"hidden_size": 66}, {"num_hidden_layers": 0}, {"vocab_size": True}],
)
def test_sizes_that_contradict_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(change))):
        ModelShape.from_config(TINY | {"model_type": "qwen2"} | change)


def test_contradicting_v1_keys_are_refused() -> None:
    with pytest.raises(ModelError, match="n_embd"):
        ModelShape.from_config(V1_7B | {"n_embd": 2048})


@pytest.mark.parametrize(("bits", "group"), [(3, 128), (4, 0), (4, 4096), (4, -2)])
def test_settings_that_do_not_fit_are_refused(bits: int, group: int) -> None:
    with pytest.raises(UsageError):
        catalogue.entry("smollm2-135m-instruct").shape.quantised_bytes(bits, group)
