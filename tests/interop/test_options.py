"""Folders of other options, in GPTQModel: free zero points, whole rows, bits by module, experts, hybrids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dequantised import logits_of
from pipeline import run
from tiny_families import random_tokens, write_calibration, write_family
from tiny_published import FAMILIES, transformers_of, write_dequantised, write_published

from qwenq.models.checkpoint import open_checkpoint
from qwenq.publishing.engines import engine_verdicts, read_gptq_folder

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "free zero points": ("qwen3", {"sym": False, "any_engine": True}),
    "free zero points, Int8": ("qwen3", {"sym": False, "any_engine": True, "bits": 8}),
    "whole rows": ("qwen3", {"group_size": -1}),
    "biases, whole rows": ("qwen2", {"group_size": -1}),
    "attention in 8 bits": ("qwen3", {"module_bits": {"self_attn": 8}}),
    "attention in 16 bits": ("qwen3", {"module_bits": {"self_attn": 16}}),
    "bits by block": ("qwen3", {"budget": 6.5}),
    "experts": ("qwen3_moe", {}),
    "experts, Int8": ("qwen3_moe", {"bits": 8}),
    "hybrid": ("qwen3_next", {}),
    "hybrid, text only": ("qwen3_5_text", {}),
    "hybrid with experts": ("qwen3_5_moe_text", {}),
}


@dataclass(frozen=True)
class Case:
    """A quantised folder, a prompt, and the logits of its dequantised weights in transformers."""

    folder: Path
    ids: list[int]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All made before GPTQModel loads anything: it replaces blocks of transformers in this process."""
    pytest.importorskip("gptqmodel", reason="needs the environment of `make interop`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {
            name: made(tmp_path_factory.mktemp("made"), family, **settings)
            for name, (family, settings) in CASES.items()
        }


def made(place: Path, family: str, **settings: Any) -> Case:
    """A quantised random model."""
    if family in FAMILIES:
        model = write_published(place / "m", family)
        settings["calibration"] = write_calibration(model, place / "t.safetensors", samples=8)
    else:
        model = write_family(place / "m", family)
    run(model, place / "out", **settings)
    ids = random_tokens(model, 1, 40, seed=5)[0].tolist()
    reference = transformers_of(write_dequantised(place / "out", place / "plain"))
    return Case(place / "out", ids, logits_of(reference, ids))


def in_gptqmodel(folder: Path) -> Any:
    """The model as GPTQModel loads it, in float32 throughout: it keeps all that is not packed in float16."""
    from gptqmodel import BACKEND, GPTQModel

    found = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    model = found.model.float().eval()
    packed = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
    stored = open_checkpoint(folder)
    plain = {n: stored.read(n).float() for n in stored.names() if n.rpartition(".")[0] not in packed}
    biases = {n: stored.read(n).float() for n in stored.names() if n.endswith(".bias")}
    assert model.load_state_dict(plain | biases, strict=False).unexpected_keys == []
    assert len(packed) == sum(name.endswith(".qweight") for name in stored.names())
    return model


def test_its_default_cpu_kernel_stops_at_int4_of_whole_rows(cases: dict[str, Case]) -> None:
    """What `check --for` notes; where this fails, the note has served its time."""
    from gptqmodel import GPTQModel

    case = cases["whole rows"]
    with torch.no_grad(), pytest.raises(RuntimeError, match="qGroupSize"):
        GPTQModel.load(str(case.folder), device="cpu").model(torch.tensor([case.ids]))
    (verdict,) = engine_verdicts(read_gptq_folder(open_checkpoint(case.folder)), ["gptqmodel"])
    assert verdict.loads and "Int4 of whole rows" in verdict.notes[0]


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_computes_what_we_compute(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    found = logits_of(in_gptqmodel(case.folder), case.ids)
    torch.testing.assert_close(found, case.logits, atol=1e-3, rtol=0)
    (verdict,) = engine_verdicts(read_gptq_folder(open_checkpoint(case.folder)), ["gptqmodel"])
    assert verdict.loads
