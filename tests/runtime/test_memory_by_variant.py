"""Int4 and Int8 take less memory than BF16 does, whatever variant of the C library a CPU runs."""

from __future__ import annotations

import pytest
import torch
from runtime.quantised_models import quantised_model
from runtime.small_models import small_model

from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.runtime.engine import FastEngine, load

pytestmark = pytest.mark.usefixtures("each_variant")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def held_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of all weights of a model that is loaded as a user loads it."""
    engine = load(checkpoint, device="cpu")
    assert isinstance(engine, FastEngine)
    assert engine.dtype is torch.bfloat16
    decoder = engine.decoder
    linears = [linear for block in decoder.blocks for linear in block.linears]
    return decoder.embedding.nbytes + decoder.head.nbytes + sum(linear.nbytes for linear in linears)


@pytest.mark.parametrize(("bits", "part"), [(4, 0.45), (8, 0.75)])
def test_quantised_weights_are_held_as_they_are_stored(bits: int, part: float) -> None:
    """The embedding and the head, half of this small model, stay in 16 bits."""
    _, base = small_model("qwen3", **SIZES)
    full = held_bytes(base)
    fixed = 2 * held_fixed(base)
    found = held_bytes(quantised_model("qwen3", QuantConfig(bits=bits, group_size=32), **SIZES))
    assert found < full
    assert found - fixed < part * (full - fixed)


def held_fixed(checkpoint: Checkpoint) -> int:
    """Return the bytes of the embedding in 16 bits."""
    return checkpoint.read("model.embed_tokens.weight").numel() * 2
