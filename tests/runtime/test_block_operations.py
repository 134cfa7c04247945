"""Decoders over the C kernels beside decoders in torch, and what is said of them."""

from __future__ import annotations

import pytest
import torch
from runtime.small_models import FAMILIES, HYBRIDS, random_ids, small_model

from qwenq.compute import cpu
from qwenq.models.checkpoint import Checkpoint
from qwenq.runtime import engine as door
from qwenq.runtime.engine import FastEngine, load

needs_kernels = pytest.mark.skipif(
    cpu.unsupported_reason() is not None, reason=f"no C kernels here: {cpu.unsupported_reason()}"
)


def fast_engine(checkpoint: Checkpoint, dtype: str) -> FastEngine:
    engine = load(checkpoint, device="cpu", dtype=dtype, engine="fast")
    assert isinstance(engine, FastEngine)
    return engine


def logits_of(engine: FastEngine) -> torch.Tensor:
    """Of ragged prompts behind a shared beginning, and of more behind them."""
    shared = engine.new_cache(1, 33)
    engine.prefill([random_ids(33)], shared)
    cache = shared.take([0] * 3, 130)
    first = engine.prefill([random_ids(n, n) for n in (40, 1, 17)], cache)
    every = engine.logits([random_ids(n, 2 * n) for n in (5, 30, 12)], cache)
    return torch.cat([first, *every])


@needs_kernels
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_a_decoder_with_kernels_is_as_near_to_float32_as_in_torch(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = small_model(family)
    ours = logits_of(fast_engine(checkpoint, "bfloat16"))
    in_float32 = logits_of(fast_engine(checkpoint, "float32"))
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    exact, torchs = (logits_of(fast_engine(checkpoint, dtype)) for dtype in ("float32", "bfloat16"))
    torch.testing.assert_close(in_float32, exact, rtol=1e-4, atol=1e-4)
    # Rounding may send a token to other experts where two are near a tie: a mixture is judged by its median.
    whole = torch.Tensor.median if "moe" in family or "next" in family else torch.Tensor.norm
    assert whole((ours - exact).norm(dim=-1)) <= 1.25 * whole((torchs - exact).norm(dim=-1))
    assert not torch.equal(ours, torchs), "both ran the same code"


@needs_kernels
def test_operations_that_run_in_torch_get_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = small_model("llama")
    notice = "norms, rotary positions, activations and attention of prompts run in torch"
    engine = fast_engine(checkpoint, "bfloat16")
    assert not any(notice in note for note in engine.notes)
    assert f"C for {cpu.variant_name()}" in engine.implementation
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    engine = fast_engine(checkpoint, "bfloat16")
    (said,) = (note for note in engine.notes if notice in note)
    assert said.endswith("because QWENQ_CPU=torch turns it off")
    assert "C for" not in engine.implementation
    assert not any(notice in note for note in fast_engine(checkpoint, "float16").notes)


@pytest.mark.parametrize("faster", [False, True])
def test_the_implementation_names_float32_units(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.cpu, "float32_is_faster", lambda: faster)
    _, checkpoint = small_model("llama")
    said = {
        dtype: "prompts multiplied by float32 units" in fast_engine(checkpoint, dtype).implementation
        for dtype in ("bfloat16", "float32")
    }
    assert said == {"bfloat16": faster, "float32": False}
