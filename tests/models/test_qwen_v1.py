"""Qwen v1 read as Qwen2: against a plain v1 forward, on random models and on real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.plain_qwen_v1 import (
    MemorySource,
    forward,
    llama_to_v1,
    original_keys,
    quantise_v1,
    random_tensors,
    small_config,
    write_v1,
)
from torch import Tensor

from qwenq.errors import ModelError, QwenqError, UnsupportedError, UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, validate_quantised
from qwenq.models.qwen_v1 import QwenV1Source, qwen2_config, qwen2_generation_config, qwen2_view
from qwenq.models.safetensors_files import SafetensorsSource

IDS = [7, 3, 250, 11, 11, 0, 99, 42, 8, 1, 200, 5]


def view(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path = Path()
) -> tuple[dict[str, Any], QwenV1Source]:
    return qwen2_view(folder, config, MemorySource(tensors))


def transformers_model(config: dict[str, Any], source: Any) -> Any:
    """Stock Qwen2ForCausalLM with the view's tensors; every parameter has to be filled, none left over."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**{**config, "torch_dtype": "float32"})).eval()
    state = {name: source.read(name).float() for name in source.names()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    return model


def transformers_logits(config: dict[str, Any], source: Any, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = transformers_model(config, source)(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 2, "kv_channels": 32, "num_hidden_layers": 3},
        {"rotary_emb_base": 1_000_000, "layer_norm_epsilon": 1e-5, "intermediate_size": 272},
    ],
)
@pytest.mark.parametrize("keys", ["usual", "2023-08"])
def test_logits_are_those_of_a_plain_v1_forward(changes: dict[str, Any], keys: str) -> None:
    config = small_config(**changes)
    tensors = random_tensors(config, seed=len(changes))
    on_disk = config if keys == "usual" else original_keys(config)
    wanted = forward(config, tensors, IDS)
    assert wanted.std() > 0.1  # else anything would be close
    torch.testing.assert_close(transformers_logits(*view(on_disk, tensors), IDS), wanted, atol=1e-4, rtol=0)


@given(
    heads=st.integers(1, 4),
    channels=st.sampled_from([8, 16, 32]),
    ffn=st.integers(3, 40),
    layers=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8)
def test_any_shape_gives_the_same_logits(heads: int, channels: int, ffn: int, layers: int, seed: int) -> None:
    config = small_config(
        hidden_size=heads * channels,
        num_attention_heads=heads,
        kv_channels=channels,
        intermediate_size=2 * ffn,
        num_hidden_layers=layers,
    )
    tensors = random_tensors(config, seed)
    logits = transformers_logits(*view(config, tensors), IDS)
    torch.testing.assert_close(logits, forward(config, tensors, IDS), atol=1e-4, rtol=0)


def test_real_weights_in_v1_layout_write_the_same_text() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwenq.models.opening import resolve_model

    try:
        folder = resolve_model(None).folder
    except UsageError as error:
        pytest.skip(f"needs the bundled model: {error.what}")
    original = open_checkpoint(folder)
    config, tensors = llama_to_v1(
        original.config, {name: original.read(name).float() for name in original.names()}
    )
    rewritten = transformers_model(*view(config, tensors))
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(folder)("The three laws of robotics are", return_tensors="pt")
    ids = prompt["input_ids"]
    torch.testing.assert_close(
        rewritten(ids).logits[0],
        forward(config, tensors, ids[0].tolist()),
        atol=1e-4,
        rtol=0,
    )
    texts = [m.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist() for m in (rewritten, llama)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_c_attn_splits_as_dequantise_then_split_does(bits: int) -> None:
    config, tensors = quantise_v1(small_config(), random_tensors(small_config()), bits, 32)
    qwen2, source = view(config, tensors)
    quant = QuantConfig.read(qwen2)
    assert len(validate_quantised(source, quant)) == 2 * 7
    v1_plain = DequantisedSource(MemorySource(tensors), quant)
    plain = DequantisedSource(source, quant)
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = v1_plain.read(f"transformer.h.{layer}.attn.c_attn.{kind}").chunk(3)
            for part, name in zip(parts, ("q", "k", "v"), strict=True):
                assert torch.equal(plain.read(f"model.layers.{layer}.self_attn.{name}_proj.{kind}"), part)
    assert not [name for name in source.names() if name.endswith(("o_proj.bias", "up_proj.bias"))]
    v1_state = {name: v1_plain.read(name).float() for name in v1_plain.names()}
    torch.testing.assert_close(
        transformers_logits(qwen2, plain, IDS), forward(config, v1_state, IDS), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("keys", ["usual", "2023-08"])
def test_a_folder_is_opened_without_its_tensors_and_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    config = small_config()
    tensors = random_tensors(config)
    write_v1(tmp_path, config if keys == "usual" else original_keys(config), tensors)
    reads: list[str] = []
    read = SafetensorsSource.read

    def counted(self: SafetensorsSource, name: str) -> Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    checkpoint = open_checkpoint(tmp_path)
    for name in checkpoint.names():
        checkpoint.info(name)
    assert reads == []
    fused = "transformer.h.1.attn.c_attn.weight"
    assert torch.equal(checkpoint.read("model.layers.1.self_attn.q_proj.weight"), tensors[fused][:64])
    assert reads == [fused]
    torch.testing.assert_close(
        transformers_logits(checkpoint.config, checkpoint.source, IDS),
        forward(config, tensors, IDS),
        atol=1e-4,
        rtol=0,
    )


def test_info_agrees_with_what_is_read_and_nothing_keeps_the_fused_tensor_alive() -> None:
    config, tensors = quantise_v1(small_config(), random_tensors(small_config()), 4, 32)
    for _, source in (view(config, tensors), view(small_config(), random_tensors(small_config()))):
        for name in source.names():
            tensor, info = source.read(name), source.info(name)
            assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_config_of_qwen_7b() -> None:
    """Published values (72B's rotary base is checked in the logits test)."""
    v1 = {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128,
        "intermediate_size": 22016, "vocab_size": 151936, "seq_length": 8192,
        "max_position_embeddings": 32768, "rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6,
        "use_dynamic_ntk": True, "use_logn_attn": False, "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    }  # fmt: skip
    config = qwen2_config(v1, "bfloat16")
    assert config["intermediate_size"] == 11008
    assert config["num_key_value_heads"] == 32
    assert (config["rope_theta"], config["rms_norm_eps"]) == (10000.0, 1e-6)
    assert config["torch_dtype"] == "bfloat16"
    assert config["qwen_v1"] == {
        "seq_length": 8192, "use_dynamic_ntk": True, "use_logn_attn": False, "real_vocab": 151851,
    }  # fmt: skip
    assert "auto_map" not in config


def test_generation_config_stops_a_chat_at_im_end() -> None:
    chat = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144,
            "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8}  # fmt: skip
    config = qwen2_config(small_config(vocab_size=151936))
    assert qwen2_generation_config(chat, config) == {
        "bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
        "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "max_window_size": 6144,
    }  # fmt: skip
    base = {**chat, "chat_format": "raw", "stop_words_ids": [[151643]]}
    assert qwen2_generation_config(base, config)["eos_token_id"] == 151643


def test_buffers_of_old_checkpoints_are_ignored() -> None:
    tensors = random_tensors(small_config())
    more = {
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    assert set(view(small_config(), tensors | more)[1].names()) == set(
        view(small_config(), tensors)[1].names()
    )


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"n_embd": 128}, ["hidden_size is 64", "n_embd is 128"]),
        ({"n_layer": 3}, ["num_hidden_layers is 2", "n_layer is 3"]),
        ({"kv_channels": 32}, ["kv_channels 32", "hidden_size is 64"]),
        ({"intermediate_size": 191}, ["intermediate_size", "191"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"hidden_size": None}, ["hidden_size", "n_embd"]),
        ({"use_dynamic_ntk": "yes"}, ["use_dynamic_ntk", "'yes'"]),
    ],
)
def test_a_config_that_contradicts_itself_names_the_keys(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ModelError) as raised:
        qwen2_config(small_config(**changes))
    assert all(name in str(raised.value) for name in names)
    assert raised.value.hint
    assert raised.value.exit_code == 1


def _without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in random_tensors(small_config()).items() if key != name}


@pytest.mark.parametrize(
    ("tensor", "shape", "error", "says"),
    [
        (
            "transformer.h.1.attn.c_attn.weight",
            (128, 64),
            ModelError,
            r"shape \(128, 64\), config.json asks for \(192, 64\)",
        ),
        (
            "transformer.h.1.attn.c_attn.bias",
            (64,),
            ModelError,
            r"shape \(64,\), config.json asks for \(192,\)",
        ),
        (
            "transformer.h.0.mlp.w1.weight",
            (192, 64),
            ModelError,
            r"shape \(192, 64\), config.json asks for \(96, 64\)",
        ),
        ("transformer.h.1.ln_2.weight", None, ModelError, "missing"),
        ("transformer.h.2.ln_1.weight", (64,), ModelError, "does not have"),
        ("transformer.visual.proj", (64, 64), UnsupportedError, "multimodal"),
        ("transformer.h.0.mlp.w1.bias", (96,), ModelError, "not zero"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tensor: str, shape: tuple[int, ...] | None, error: type[QwenqError], says: str
) -> None:
    tensors = _without(tensor)
    if shape is not None:
        tensors[tensor] = torch.ones(shape)
    with pytest.raises(error, match=says) as raised:
        view(small_config(), tensors)
    assert tensor in str(raised.value)


def test_activation_order_is_refused() -> None:
    config, tensors = quantise_v1(small_config(), random_tensors(small_config()), 4, 32)
    name = "transformer.h.1.attn.c_attn.g_idx"
    tensors[name] = tensors[name].flip(0)
    with pytest.raises(UnsupportedError, match="activation order") as raised:
        view(config, tensors)
    assert raised.value.where == name


def test_settings_in_quantize_config_json_alone_are_found(tmp_path: Path) -> None:
    config, tensors = quantise_v1(small_config(), random_tensors(small_config()), 8, 32)
    settings_json = config.pop("quantization_config")
    with pytest.raises(ModelError, match=r"neither config.json nor quantize_config.json"):
        view(config, tensors, tmp_path)
    del settings_json["quant_method"]
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings_json))
    assert view(config, tensors, tmp_path)[0]["quantization_config"]["bits"] == 8
