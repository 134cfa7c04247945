"""What options of `quantize` and `convert` make of a folder, in GPTQModel and in llama.cpp's converter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dequantised import logits_of
from pipeline import run
from regrouped import regrouped
from tiny_families import random_tokens, write_calibration, write_family
from tiny_published import FAMILIES, write_published

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_format import DequantisedSource, QuantConfig
from qwenq.publishing.engines import engine_verdicts, read_gptq_folder
from qwenq.runtime.engine import load

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "free zero points": ("qwen3", {"sym": False, "any_engine": True}),
    "free zero points, Int8": ("qwen3", {"sym": False, "any_engine": True, "bits": 8}),
    "whole rows": ("qwen3", {"group_size": -1}),
    "biases, whole rows": ("qwen2", {"group_size": -1}),
    "attention in 8 bits": ("qwen3", {"module_bits": {"self_attn": 8}}),
    "attention in 16 bits": ("qwen3", {"module_bits": {"self_attn": 16}}),
    "experts": ("qwen3_moe", {}),
    "experts, Int8": ("qwen3_moe", {"bits": 8}),
    "hybrid": ("qwen3_next", {}),
    "hybrid, text only": ("qwen3_5_text", {}),
    "hybrid with experts": ("qwen3_5_moe_text", {}),
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="needs the environment of `make interop`")
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def made(tmp_path: Path, family: str, **settings: Any) -> Path:
    """A quantised random model."""
    if family in FAMILIES:
        model = write_published(tmp_path / "m", family)
        settings["calibration"] = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    else:
        model = write_family(tmp_path / "m", family)
    run(model, tmp_path / "out", **settings)
    return tmp_path / "out"


def in_gptqmodel(folder: Path, backend: str) -> Any:
    """The model as GPTQModel loads it, its plain kernel's products in float32."""
    from gptqmodel import BACKEND, GPTQModel

    found = GPTQModel.load(str(folder), device="cpu", backend=BACKEND(backend), dtype=torch.float32)
    stored = open_checkpoint(folder)
    for name, module in found.model.named_modules():
        if hasattr(module, "qweight"):  # as loaded it would multiply scale by integer in float16
            module.scales = module.scales.float()
            if module.bias is not None:
                module.bias = stored.read(f"{name}.bias").float()
    return found.model.eval()


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_computes_what_we_compute(tmp_path: Path, name: str) -> None:
    family, settings = CASES[name]
    folder = made(tmp_path, family, **settings)
    ids = random_tokens(tmp_path / "m", 1, 40, seed=5)[0].tolist()
    engine = "transformers" if family in FAMILIES else "fast"
    (wanted,) = load(folder, device="cpu", dtype="float32", engine=engine).logits([ids])
    found = logits_of(in_gptqmodel(folder, "gptq_torch"), ids)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)
    (verdict,) = engine_verdicts(read_gptq_folder(open_checkpoint(folder)), ["gptqmodel"])
    assert verdict.loads
