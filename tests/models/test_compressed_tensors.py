"""A GPTQ checkpoint in the layout of compressed-tensors: its reader finds the same weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import run
from tiny_families import write_calibration, write_family
from tiny_published import write_published

from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.compressed_tensors import CompressedTensorsView
from qwenq.models.foreign_formats import ForeignSource, foreign_format
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource


def quantised(tmp_path: Path, family: str = "qwen3", **settings: Any) -> tuple[Checkpoint, QuantConfig]:
    if family == "qwen3":
        model = write_family(tmp_path / "m", family)
    else:
        model = write_published(tmp_path / "m", family)
        settings["calibration"] = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    run(model, tmp_path / "out", **settings)
    checkpoint = open_checkpoint(tmp_path / "out")
    return checkpoint, QuantConfig.read(checkpoint.published_config)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 8}, {"group_size": -1}, {"module_bits": {"self_attn": 8}}],
    ids=["int4", "int8", "whole rows", "mixed"],
)
def test_the_weights_are_the_same_to_the_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint, quant = quantised(tmp_path, **settings)
    view = CompressedTensorsView(checkpoint.published, quant)
    found = foreign_format({"quantization_config": view.settings()}, tmp_path)
    assert found is not None
    read = ForeignSource(view, found, torch.float32)
    plain = DequantisedSource(checkpoint.published, quant, torch.float32)
    assert set(read.names()) == set(plain.names())
    for name in plain.names():
        assert torch.equal(read.read(name), plain.read(name))
        assert read.info(name) == plain.info(name)
    for name in view.names():
        assert view.info(name).shape == tuple(view.read(name).shape)
        assert view.info(name).dtype == view.read(name).dtype


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_what_is_not_quantised_is_ignored_and_nothing_else(tmp_path: Path, family: str) -> None:
    checkpoint, quant = quantised(tmp_path, family, module_bits={"self_attn": 8})
    view = CompressedTensorsView(checkpoint.published, quant)
    settings = view.settings()
    ignored = settings["ignore"]

    def matches(targets: list[str], name: str) -> bool:
        return any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in targets)

    for name in view.names():
        module = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            assert not matches(ignored, module), module
            eight = matches(settings["config_groups"]["group_0"]["targets"], module)
            assert eight == ("self_attn" in module)
        elif name.endswith(".weight") and view.info(name).shape[-1:] and len(view.info(name).shape) == 2:
            kept = matches(ignored, module) or "embed_tokens" in module or "norm" in module
            assert kept or "conv1d" in module, module
    widths = {key: group["weights"]["num_bits"] for key, group in settings["config_groups"].items()}
    assert widths == {"group_0": 8, "group_1": 4}
    assert settings["config_groups"]["group_1"]["targets"] == ["Linear"]


@pytest.mark.parametrize(
    ("settings", "said"), [({"sym": False}, "free zero points"), ({"desc_act": True}, "activation order")]
)
def test_what_has_no_such_form_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    checkpoint, quant = quantised(tmp_path)
    with pytest.raises(UnsupportedError, match=said):
        CompressedTensorsView(checkpoint.published, replace(quant, **settings))
