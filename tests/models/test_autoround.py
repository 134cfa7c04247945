"""AutoRound's checkpoints open as the GPTQ or AWQ files that they are, by its own packing formats."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import write_foreign
from models.plain_qwen_v1 import MemorySource
from safetensors.torch import load_file, save_file
from tiny_families import write_family

from qwenq.conversion import convert
from qwenq.errors import ModelError, QwenqError, UnsupportedError
from qwenq.models.autoround import gptq_settings, is_autoround
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, validate_quantised


def packed(name: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "packing_format": name, "bits": 4, "group_size": 128, **more}


@pytest.mark.parametrize("kind", ["autoround:auto_gptq", "autoround:gptqmodel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_read_as_the_packing_format_stores_them(tmp_path: Path, kind: str, bits: int) -> None:
    model = write_family(tmp_path / "m", "qwen3")
    expected = write_foreign(model, tmp_path / "f", kind, bits=bits)
    checkpoint = open_checkpoint(tmp_path / "f")
    assert any("AutoRound, in GPTQ's layout" in notice for notice in checkpoint.notices)
    quant = QuantConfig.read(checkpoint.config)
    assert (quant.bits, quant.group_size, quant.sym) == (bits, 32, False)
    assert len(validate_quantised(checkpoint.source, quant)) == 21
    plain = DequantisedSource(checkpoint.source, quant, torch.float32)
    for name, weight in expected.items():
        assert torch.equal(plain.read(name), weight)


PACKER = """
import importlib, sys
import torch
from safetensors.torch import load_file, save_file
given, made = load_file(sys.argv[1]), {}
rows, columns = given["weight"].shape
linear = torch.nn.Linear(columns, rows, bias=False)
linear.weight.data = given["weight"]
for layout, name in (("auto_round:auto_gptq", "qlinear_torch_zp"), ("auto_round:gptqmodel", "qlinear_torch")):
    for bits in (2, 3, 4, 8):
        packer = importlib.import_module(f"auto_round_extension.torch.{name}").QuantLinear
        packer = packer(bits, 32, columns, rows, False)
        packer.device = "cpu"  # which its packing of tensors of zero points asks for
        packer.pack(linear, given[f"scales {bits}"], given[f"zeros {bits}"], None, "cpu")
        for part in ("qweight", "qzeros", "scales"):
            made[f"{layout} {bits}.{part}"] = getattr(packer, part).contiguous()
        packer.post_init()
        made[f"{layout} {bits}"] = packer(torch.eye(columns)).t().contiguous()
save_file(made, sys.argv[2])
"""
"""Packs a weight as AutoRound does, in every layout and width, and multiplies by it to see what it means."""


def test_what_autoround_packs_is_read_as_it_means_it(tmp_path: Path) -> None:
    python = os.environ.get("QWENQ_AUTOROUND_PYTHON")
    if not python:
        pytest.skip("needs $QWENQ_AUTOROUND_PYTHON, the Python of `make autoround`")
    generator = torch.Generator().manual_seed(0)
    given = {"weight": torch.randn(64, 128, generator=generator)}
    for bits in (2, 3, 4, 8):
        given[f"scales {bits}"] = (torch.rand(64, 4, generator=generator) + 1).half().float() * 4 / 2**bits
        given[f"zeros {bits}"] = torch.randint(1, 2**bits - 1, (64, 4), generator=generator).float()
    save_file(given, tmp_path / "given")
    subprocess.run([python, "-c", PACKER, tmp_path / "given", tmp_path / "made"], check=True)
    made = load_file(tmp_path / "made")
    for name in (name for name in made if "." not in name):
        layout, bits = name.split()
        settings = packed(layout, bits=int(bits), group_size=32, sym=False)
        quant = QuantConfig.read(gptq_settings(settings, tmp_path))
        found = DequantisedSource(MemorySource(made), quant, torch.float32).read(f"{name}.weight")
        torch.testing.assert_close(found, made[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["autoround:auto_gptq", "autoround:gptqmodel"])
def test_convert_writes_a_gptq_folder(tmp_path: Path, kind: str) -> None:
    expected = write_foreign(write_family(tmp_path / "m", "qwen3"), tmp_path / "f", kind)
    done = convert(tmp_path / "f", tmp_path / "g", zeros="v2")
    assert "AutoRound's settings → GPTQ's" in done.changes
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    assert not is_autoround(config)
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    checkpoint = open_checkpoint(tmp_path / "g")
    plain = DequantisedSource(checkpoint.source, QuantConfig.read(checkpoint.config), torch.float32)
    for name, weight in expected.items():
        assert torch.equal(plain.read(name), weight)


@pytest.mark.parametrize(
    ("keys", "stored"),
    [
        (packed("auto_round:auto_gptq"), "gptq"),
        (packed("auto_round:gptqmodel"), "gptq_v2"),
        (packed("auto_round"), "gptq_v2"),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2", "bits": 4}, "gptq"),
    ],
)
def test_every_name_of_its_layouts_is_known(tmp_path: Path, keys: dict[str, Any], stored: str) -> None:
    found = gptq_settings(keys, tmp_path)
    assert found["checkpoint_format"] == stored
    assert found["sym"] is True
    assert is_autoround({"quantization_config": keys})


def test_single_modules_have_settings_of_their_own(tmp_path: Path) -> None:
    extra = {
        ".*self_attn.*": {"bits": 8, "group_size": 64},
        "model.layers.0.self_attn.q_proj": {"bits": 2},
        "model.layers.1.mlp.down_proj": {"bits": 16, "act_bits": 16},
        "v_proj$|k_proj$": {"bits": 4},
    }
    quant = QuantConfig.read(gptq_settings(packed("auto_round:auto_gptq", extra_config=extra), tmp_path))
    assert quant.of("model.layers.0.self_attn.q_proj").bits == 2  # a name wins over a pattern
    assert quant.of("model.layers.10.self_attn.q_proj").bits == 8
    assert quant.of("model.layers.1.self_attn.v_proj").group_size == 64  # the first pattern counts
    assert quant.of("model.layers.1.mlp.up_proj").bits == 4
    with pytest.raises(ModelError, match="not quantised, but it is"):
        quant.of("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (packed("auto_round:mlx"), "'auto_round:mlx' is not read"),
        (packed("auto_round:auto_gptq", data_type="mx_fp"), "'mx_fp' is not read"),
        (packed("auto_round:auto_gptq", act_bits=8), "activations of 8 bits"),
        (packed("auto_round:auto_gptq", extra_config=["lm_head"]), "extra_config"),
        (packed("auto_round:auto_gptq", extra_config={"lm_head": 4}), "extra_config"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises((UnsupportedError, ModelError), match=said) as caught:
        gptq_settings(keys, tmp_path)
    assert caught.value.hint


def test_bits_that_have_no_kernel_are_refused_when_the_folder_is_run(tmp_path: Path) -> None:
    with pytest.raises(QwenqError, match="bits is None"):
        QuantConfig.read(gptq_settings(packed("auto_round:auto_gptq", bits=None), tmp_path))
