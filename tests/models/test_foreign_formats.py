"""Weights of other tools read as what they stand for, exactly; what is not read is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import packed_words, write_foreign
from safetensors.torch import load_file, save_file
from tiny_families import write_family

from qwenq.errors import ModelError, QwenqError, UnsupportedError
from qwenq.models.checkpoint import open_checkpoint, open_weights
from qwenq.models.foreign_formats import ForeignSource, foreign_format
from qwenq.models.gptq_format import from_int32

KINDS = [
    ("awq", 4, 32),
    ("packed", 4, 32),
    ("packed", 3, 32),
    ("packed", 8, 16),
    ("packed-symmetric", 4, 32),
    ("mixed", 4, 32),
    ("autoround:auto_awq", 4, 32),
    ("int8", 8, 0),
    ("float8", 8, 0),
    ("fp8", 8, 0),
]


@pytest.mark.parametrize(("kind", "bits", "group"), KINDS)
def test_every_format_is_read_as_the_weights_that_it_stands_for(
    tmp_path: Path, kind: str, bits: int, group: int
) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    expected = write_foreign(model, tmp_path / "f", kind, bits=bits, group=group)
    found = foreign_format(json.loads((tmp_path / "f" / "config.json").read_text()), tmp_path)
    assert found is not None
    assert found.bits == bits
    source = ForeignSource(open_weights(tmp_path / "f")[0], found, torch.float32)
    assert set(source.names()) == set(open_weights(model)[0].names())
    assert len(expected) == len(source.modules) == 21
    for name in source.names():
        read = source.read(name)
        assert source.info(name).shape == tuple(read.shape)
        assert source.info(name).dtype == read.dtype
        assert torch.equal(read, expected.get(name, open_weights(model)[0].read(name)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_across_words_are_put_together(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (5, 37), dtype=torch.uint8)
    assert torch.equal(from_int32(packed_words(values, bits), bits)[:, :37], values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not read"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "its gemv layout"),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, "AWQ of 3 bits"),
        ({"quant_method": "awq", "bits": "four", "group_size": 128}, "bits is 'four'"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "compressed-tensors"}, "no scheme for weights"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "'nvfp4-pack-quantized' of 4 bits",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": "four", "type": "int"}}},
            },
            "weights of 'four' bits",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int"}},
                    "b": {"format": "float-quantized", "weights": {"num_bits": 8, "type": "float"}},
                },
            },
            "'float-quantized' and 'pack-quantized' of 4 and 8 bits",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "sparse, too",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "transform_config": {"config_groups": {"R1": {"type": "hadamard"}}},
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}},
            },
            "rotated, too",
        ),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "act_bits": 8}, "8 bits"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((UnsupportedError, ModelError)) as caught:
        foreign_format({"quantization_config": settings}, tmp_path)
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}])
def test_plain_and_gptq_models_are_no_foreign_ones(tmp_path: Path, config: dict[str, Any]) -> None:
    assert foreign_format(config, tmp_path) is None


def test_tensors_that_do_not_fit_name_their_module(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    write_foreign(model, tmp_path / "f", "awq")
    found = foreign_format(json.loads((tmp_path / "f" / "config.json").read_text()), tmp_path)
    assert found is not None
    stored = open_weights(tmp_path / "f")[0]
    read = stored.read
    name = "model.layers.0.self_attn.q_proj"
    stored.read = lambda n: read(n)[:, :3] if n == f"{name}.scales" else read(n)  # type: ignore[method-assign]
    with pytest.raises(QwenqError) as caught:
        ForeignSource(stored, found, torch.float32).read(f"{name}.weight")
    assert caught.value.where == name


def test_a_width_that_config_json_does_not_name_is_refused(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    write_foreign(model, tmp_path / "f", "packed", bits=8)
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    found = foreign_format(config, tmp_path)
    assert found is not None
    source = ForeignSource(open_weights(tmp_path / "f")[0], found, torch.float32)
    with pytest.raises(ModelError, match="its weights have 8 bits"):
        source.read("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("kind", "left_out"), [("fp8", True), ("int8", True), ("packed", False), ("awq", False)]
)
def test_a_notice_says_what_is_read_and_what_is_left_out(tmp_path: Path, kind: str, left_out: bool) -> None:
    write_foreign(write_family(tmp_path / "m", "qwen3"), tmp_path / "f", kind)
    checkpoint = open_checkpoint(tmp_path / "f")
    (said,) = checkpoint.notices
    assert "quantised by another tool" in said
    assert ("activations" in said) == left_out
    assert len(checkpoint.foreign_modules) == 21


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        ("awq", "qweight", torch.zeros(8, dtype=torch.int32)),
        ("awq", "scales", torch.zeros(0, 64, dtype=torch.float16)),
        ("packed", "weight_shape", torch.tensor([64, 1 << 40])),
        ("packed", "weight_shape", torch.tensor([64, 0])),
        ("packed", "weight_shape", torch.tensor([64])),
        ("packed", "weight_scale", torch.zeros(64, 0, dtype=torch.float16)),
        ("int8", "weight_scale", torch.zeros(64, 5)),
        ("fp8", "weight_scale_inv", torch.zeros(1, 1)),
    ],
)
def test_damaged_tensors_are_a_message_that_names_the_module(
    tmp_path: Path, kind: str, part: str, value: torch.Tensor
) -> None:
    write_foreign(write_family(tmp_path / "m", "qwen3"), tmp_path / "f", kind)
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    tensors[f"model.layers.0.self_attn.q_proj.{part}"] = value
    save_file(tensors, tmp_path / "f" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="do not fit each other") as caught:
        open_checkpoint(tmp_path / "f").read("model.layers.0.self_attn.q_proj.weight")
    assert caught.value.where == "model.layers.0.self_attn.q_proj"
