"""Causal attention as compiled code, beside float64 and torch's; where it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import write_family
from torch import Tensor
from torch.nn import functional

from qwenq.models import block_attention
from qwenq.models.block_attention import NATIVE, TORCH, attention_of
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.native import support

CPU = torch.device("cpu")
UNABLE = support.why_not(*support.BFLOAT16)
needs_bfloat16 = pytest.mark.skipif(UNABLE is not None, reason=f"no such attention here: {UNABLE}")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[batch, tokens, heads, d]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


@needs_bfloat16
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    sharing=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 60), st.sampled_from([95, 96, 97, 300])),
    d=st.sampled_from([16, 48, 64, 80, 128]),
    scale=st.sampled_from([0.05, 0.3, 2.0]),
)
def test_any_shape_is_as_near_to_float64_as_torchs_own(
    batch: int, kv_heads: int, sharing: int, tokens: int, d: int, scale: float
) -> None:
    from qwenq.models.native_attention import causal_attention

    # As blocks give them: heads beside each other in memory, in one tensor of queries, keys and values.
    qkv = drawn(tokens, batch, tokens, (sharing + 2) * kv_heads, d).transpose(1, 2)
    q, k, v = qkv.split([sharing * kv_heads, kv_heads, kv_heads], 1)
    exact = by_torch(q.double(), k.double(), v.double(), scale)
    got = causal_attention(q, k, v, scale)
    assert got.dtype is torch.bfloat16
    ours, torchs = ((x.double() - exact).norm() for x in (got, by_torch(q, k, v, scale)))
    assert ours <= 1.05 * torchs + 1e-9 * exact.norm()


@needs_bfloat16
def test_what_comes_later_changes_nothing() -> None:
    from qwenq.models.native_attention import causal_attention

    q, k, v = (drawn(i, 2, 2, 100, 32) for i in range(3))
    whole = causal_attention(q, k, v, 0.2)
    for tokens in (1, 37, 64):
        assert torch.equal(causal_attention(*(x[:, :, :tokens] for x in (q, k, v)), 0.2), whole[:, :tokens])


@needs_bfloat16
def test_what_is_not_finite_is_not_hidden() -> None:
    from qwenq.models.native_attention import causal_attention

    q, k, v = (drawn(i, 1, 1, 20, 16) for i in range(3))
    k[0, 0, 10, 3] = float("nan")
    assert not causal_attention(q, k, v, 0.2)[0, 10:].isfinite().any()


@needs_bfloat16
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_blocks_take_it_and_come_as_near_to_float32(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_family(tmp_path / "model", family)
    tokens = torch.randint(0, 90, (3, 70), generator=torch.Generator().manual_seed(0))

    def after_blocks(dtype: torch.dtype) -> tuple[str, Tensor]:
        decoder = BlockwiseDecoder(open_checkpoint(folder), CPU, dtype)
        with torch.inference_mode():
            (hidden,) = decoder.embed([tokens])
            for index in range(len(decoder.names)):
                with decoder.block(index) as block:
                    hidden = decoder.forward(block, hidden)
        return decoder.attention, hidden.double()

    name, exact = after_blocks(torch.float32)
    assert name == TORCH
    name, compiled = after_blocks(torch.bfloat16)
    assert name == NATIVE
    monkeypatch.setattr(block_attention.support, "why_not", lambda *features: "not today")
    name, plain = after_blocks(torch.bfloat16)
    assert name == TORCH
    assert (compiled - exact).norm() <= 1.2 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim"),
    [("cuda", torch.bfloat16, 64), ("cpu", torch.float32, 64), ("cpu", torch.bfloat16, 24)],
)
def test_elsewhere_it_is_torchs(device: str, dtype: torch.dtype, head_dim: int) -> None:
    assert attention_of(torch.device(device), dtype, head_dim) == TORCH
