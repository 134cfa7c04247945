"""AutoRound's checkpoints open as the GPTQ or AWQ files that they are, by its own packing formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import write_foreign
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
