"""Overflow is found where it can happen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models.plain_qwen_v1 import MemorySource
from runtime.small_models import random_ids, small_model

from qwenq.errors import ModelError
from qwenq.models.checkpoint import Checkpoint
from qwenq.runtime.cuda_graph import PATIENCE, Graphs
from qwenq.runtime.engine import FastEngine, load
from qwenq.runtime.generation import sum_in_float32


@pytest.fixture(scope="module")
def loud() -> Checkpoint:
    """A model whose activations leave the range of float16, but not of float32."""
    _, checkpoint = small_model("qwen3")
    tensors = dict(checkpoint.source.tensors)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * 3e4
    return replace(checkpoint, source=MemorySource(tensors))


def test_float16_overflow_ends_the_run(loud: Checkpoint) -> None:
    engine = load(loud, device="cpu", dtype="float16")
    with pytest.raises(ModelError, match="overflow float16"):
        engine.prefill([random_ids(9)], engine.new_cache(1, 9))
    wide = load(loud, device="cpu", dtype="float32")
    assert torch.isfinite(wide.prefill([random_ids(9)], wide.new_cache(1, 9))).all()


def test_debug_checks_the_logits_of_every_step(loud: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(loud, device="cpu", dtype="float16")
    cache = engine.new_cache(1, 9)
    engine.decode(torch.tensor([3]), cache)
    monkeypatch.setenv("QWENQ_DEBUG", "1")
    with pytest.raises(ModelError, match="overflow"):
        engine.decode(torch.tensor([3]), cache)


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_logits_of_whole_prompts_are_checked(loud: Checkpoint, engine: str) -> None:
    """Perplexity and multiple choice read these."""
    with pytest.raises(ModelError, match="overflow float16"):
        load(loud, device="cpu", dtype="float16", engine=engine).logits([random_ids(9)])


def test_debug_checks_the_logits_of_graphs(loud: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(loud, device="cpu", dtype="float16", attention="off")
    assert isinstance(engine, FastEngine)
    engine._graphs = Graphs(engine.decoder, capture=lambda step: step)
    cache = engine.new_cache(1, 20)
    for _ in range(PATIENCE + 1):
        engine.decode(torch.tensor([3]), cache)
    assert engine._graphs.captured == 1
    monkeypatch.setenv("QWENQ_DEBUG", "1")
    with pytest.raises(ModelError, match="overflow"):
        engine.decode(torch.tensor([3]), cache)


def test_products_of_float16_are_summed_in_float32_on_a_gpu() -> None:
    switches, name = torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"
    before = getattr(switches, name)
    try:
        for device, dtype in (("cpu", torch.float16), ("cuda", torch.bfloat16), ("cuda", torch.float32)):
            sum_in_float32(torch.device(device), dtype)
            assert getattr(switches, name) == before
        sum_in_float32(torch.device("cuda"), torch.float16)
        assert getattr(switches, name) is False
    finally:
        setattr(switches, name, before)
