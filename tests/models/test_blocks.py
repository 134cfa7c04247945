"""The streamed decoder against transformers' whole model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import random_tokens, write_family

from qwenq.errors import CorruptFileError, ModelError
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint

CPU = torch.device("cpu")


def open_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> BlockwiseDecoder:
    return BlockwiseDecoder(open_checkpoint(folder), CPU, dtype)


def streamed_logits(decoder: BlockwiseDecoder, batches: list[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        hidden = decoder.embed(batches)
        for index in range(len(decoder.names)):
            with decoder.block(index) as block:
                hidden = [decoder.forward(block, states) for states in hidden]
        with decoder.head() as head:
            return torch.cat([head(states) for states in hidden])


def whole_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens).logits.float()
    return logits


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("qwen3", {"head_dim": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_logits_are_those_of_the_whole_model(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    folder = write_family(tmp_path / "m", family, **changes)
    tokens = random_tokens(folder, 5, 24)
    got = streamed_logits(open_decoder(folder), list(tokens.split(2)))  # the last batch is smaller
    torch.testing.assert_close(got, whole_logits(folder, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
def test_any_stored_dtype_in_any_computed_one(tmp_path: Path, stored: str, computed: torch.dtype) -> None:
    folder = write_family(tmp_path / "m", "qwen3", stored)
    tokens = random_tokens(folder, 2, 16)
    got = streamed_logits(open_decoder(folder, computed), [tokens])
    assert got.dtype is torch.float32
    expected = whole_logits(folder, tokens, computed)
    rough = 0.05 if computed is torch.bfloat16 else 1e-4
    assert float((got - expected).norm() / expected.norm()) < rough


def test_only_one_block_has_weights_at_a_time(tmp_path: Path) -> None:
    decoder = open_decoder(write_family(tmp_path / "m"))
    assert all(p.is_meta for p in decoder.blocks[0].parameters())
    with decoder.block(1) as block:
        assert not any(p.is_meta for p in block.parameters())
        assert all(p.is_meta for p in decoder.blocks[0].parameters())
    assert all(p.is_meta for p in block.parameters())


def test_a_block_comes_back_with_its_stored_weights(tmp_path: Path) -> None:
    decoder = open_decoder(write_family(tmp_path / "m"))
    with decoder.block(0) as block:
        block.self_attn.q_proj.weight.data = torch.zeros(64, 64)
    with decoder.block(0) as block:
        assert block.self_attn.q_proj.weight.abs().sum() > 0


def damage(folder: Path, name: str, value: torch.Tensor | None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.layers.2.mlp.up_proj.weight", (64, 64), r"\(96, 64\)"),
        ("model.norm.weight", (32,), r"\(64,\)"),
        ("lm_head.weight", (100, 64), r"\(\d+, 64\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_before_the_first_layer(
    tmp_path: Path, name: str, shape: tuple[int, ...], wanted: str
) -> None:
    model = damage(write_family(tmp_path / "m", tie_word_embeddings=False), name, torch.zeros(shape))
    found = re.escape(str(shape))
    with pytest.raises(ModelError, match=rf"{name} has shape {found}.*{wanted}"):
        open_decoder(model)


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_so_is_a_missing_tensor(tmp_path: Path, name: str) -> None:
    model = damage(write_family(tmp_path / "m", tie_word_embeddings=False), name, None)
    with pytest.raises(ModelError, match=f"{name} is missing") as caught:
        open_decoder(model)
    assert "copy the folder again" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"])
def test_nan_is_named(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path / "m")
    value = load_file(folder / "model.safetensors")[name]
    value[3, 5] = torch.nan
    decoder = open_decoder(damage(folder, name, value))
    with pytest.raises(CorruptFileError, match=f"{name} holds 1 NaN"):
        streamed_logits(decoder, [random_tokens(folder, 1, 8)])


def test_the_config_may_say_it_is_quantised(tmp_path: Path) -> None:
    """The check reads a GPTQ folder through a dequantised view; transformers must not see its config."""
    folder = write_family(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(open_decoder(folder).names) == 3


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_nan_behind_the_blocks_is_named_before_them(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path / "m", tie_word_embeddings=False)
    value = load_file(folder / "model.safetensors")[name]
    value.view(-1)[5] = torch.nan
    decoder = open_decoder(damage(folder, name, value))
    with pytest.raises(CorruptFileError, match=f"{name} holds 1 NaN"):
        decoder.embed([random_tokens(folder, 1, 8)])


@pytest.mark.parametrize("name", ["self_attn.q_norm.weight", "self_attn.q_proj.bias"])
def test_a_tensor_that_the_blocks_would_leave_out_is_refused(tmp_path: Path, name: str) -> None:
    """As of a Qwen3 whose config.json says Llama: nobody would miss it, the base computes without it, too."""
    full = f"model.layers.1.{name}"
    model = damage(write_family(tmp_path / "m"), full, torch.ones(16))
    with pytest.raises(ModelError, match=f"{full} has no place in this architecture"):
        open_decoder(model)
    frequencies = (
        "model.layers.1.self_attn.rotary_emb.inv_freq"  # old files hold them; the config says them, too
    )
    assert open_decoder(damage(write_family(tmp_path / "n"), frequencies, torch.ones(8))).names
