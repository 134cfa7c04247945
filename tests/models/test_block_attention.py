"""Causal attention as compiled code, beside float64 and torch's; where it is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.native_functions import in_both, needs_float32
from tiny_families import write_family
from torch import Tensor
from torch.nn import functional

from qwenq.models.block_attention import NATIVE, TORCH, attention_of, passed_over, why_not
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.native import support

CPU = torch.device("cpu")


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[batch, tokens, heads, d]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


@in_both
@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    sharing=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 60), st.sampled_from([95, 96, 97, 300])),
    d=st.sampled_from([16, 48, 64, 80, 128]),
    scale=st.sampled_from([0.05, 0.3, 2.0]),
)
def test_any_shape_is_as_near_to_float64_as_torchs_own(
    dtype: torch.dtype, batch: int, kv_heads: int, sharing: int, tokens: int, d: int, scale: float
) -> None:
    from qwenq.models.native_attention import causal_attention

    # As blocks give them: heads beside each other in memory, in one tensor of queries, keys and values.
    qkv = drawn(tokens, batch, tokens, (sharing + 2) * kv_heads, d, dtype=dtype).transpose(1, 2)
    q, k, v = qkv.split([sharing * kv_heads, kv_heads, kv_heads], 1)
    exact = by_torch(q.double(), k.double(), v.double(), scale)
    got = causal_attention(q, k, v, scale)
    assert got.dtype is dtype
    ours, torchs = ((x.double() - exact).norm() for x in (got, by_torch(q, k, v, scale)))
    # In float32 torch rescales blocks on the way or not, as shapes have it, and sums have several parts.
    assert ours <= 1.05 * torchs + {torch.bfloat16: 1e-9, torch.float32: 2**-20}[dtype] * exact.norm()


@in_both
@settings(max_examples=40)
@given(data=st.data(), d=st.sampled_from([16, 64, 80]), sharing=st.integers(1, 3), batch=st.integers(1, 4))
def test_queries_behind_keys_that_were_there_before(
    dtype: torch.dtype, data: st.DataObject, d: int, sharing: int, batch: int
) -> None:
    """As of a cache: each row begins at a slot of its own, shorter rows have queries behind the last slot."""
    from qwenq.models.native_attention import causal_attention

    tokens, slots = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    starts = torch.tensor([data.draw(st.integers(0, slots - 1)) for _ in range(batch)])
    q = drawn(1, batch, tokens, 2 * sharing, d, dtype=dtype).transpose(1, 2)
    held = drawn(2, 2, batch, 2, slots + 9, d, dtype=dtype)
    k, v = held[:, :, :, :slots]
    got = causal_attention(q, k, v, 0.2, starts)
    for row, start in enumerate(starts.tolist()):
        real = min(tokens, slots - start)
        seen = torch.arange(slots) <= torch.arange(start, start + real).unsqueeze(1)
        of_row = [x[row : row + 1, :, :count] for x, count in ((q, real), (k, slots), (v, slots))]
        exact, torchs = (under_mask(*(x.to(kind) for x in of_row), seen) for kind in (torch.float64, q.dtype))
        apart = (got[row : row + 1, :real].double() - exact).norm()
        last = {torch.bfloat16: 2**-9, torch.float32: 2**-20}[dtype]
        assert apart <= 1.05 * (torchs.double() - exact).norm() + last * exact.norm()


def under_mask(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """[batch, tokens, heads, d], by torch."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, seen, scale=0.2).transpose(1, 2)


@in_both
def test_parts_of_a_text_give_what_the_whole_gives(dtype: torch.dtype) -> None:
    from qwenq.models.native_attention import causal_attention

    q, k, v = (drawn(i, 2, 4, 100, 32, dtype=dtype) for i in range(3))
    apart = {"rtol": 2**-6, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    whole = causal_attention(q, k, v, 0.2)
    for start, end in ((0, 8), (5, 48), (48, 97), (99, 100)):
        part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        got = causal_attention(*part, 0.2, torch.full((2,), start))
        torch.testing.assert_close(got, whole[:, start:end], **apart)


@in_both
def test_what_comes_later_changes_nothing(dtype: torch.dtype) -> None:
    from qwenq.models.native_attention import causal_attention

    q, k, v = (drawn(i, 2, 2, 100, 32, dtype=dtype) for i in range(3))
    whole = causal_attention(q, k, v, 0.2)
    for tokens in (1, 37, 64):
        assert torch.equal(causal_attention(*(x[:, :, :tokens] for x in (q, k, v)), 0.2), whole[:, :tokens])


@in_both
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype) -> None:
    from qwenq.models.native_attention import causal_attention

    q, k, v = (drawn(i, 1, 1, 20, 16, dtype=dtype) for i in range(3))
    k[0, 0, 10, 3] = float("nan")
    assert not causal_attention(q, k, v, 0.2)[0, 10:].isfinite().any()


def wrong(**changes: Tensor) -> list[Tensor]:
    """Sound q, k, v of 4 heads that share 2, but for these."""
    fitting = {name: drawn(0, 2, heads, 10, 32) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return list((fitting | changes).values())


@needs_float32
@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (wrong(q=drawn(0, 2, 4, 10, 32).half()), r"q is torch\.float16"),
        (wrong(q=drawn(0, 2, 4, 10, 32).bfloat16()), r"k is torch\.float32 .* as q is"),
        (wrong(v=drawn(0, 2, 2, 10, 32).half()), r"v is torch\.float16"),
        (wrong(k=drawn(0, 2, 2, 10, 32).to("meta")), "k is .* on meta"),
        (wrong(q=drawn(0, 4, 10, 32)), r"q is .*\[4, 10, 32\]"),
        (wrong(q=drawn(0, 2, 4, 10, 24)), "24 wide, which is no multiple of 16"),
        (wrong(q=drawn(0, 2, 3, 10, 32)), "3 heads cannot share 2"),
        (wrong(k=drawn(0, 2, 0, 10, 32), v=drawn(0, 2, 0, 10, 32)), "4 heads cannot share 0"),
        (wrong(k=drawn(0, 2, 2, 9, 32), v=drawn(0, 2, 2, 9, 32)), "do not fit"),
        (wrong(v=drawn(0, 2, 2, 9, 32)), r"v \[2, 2, 9, 32\] do not fit"),
        (wrong(v=drawn(0, 2, 2, 10, 16)), "do not fit"),
        (wrong(k=drawn(0, 1, 2, 10, 32)), "do not fit"),
    ],
)
def test_memory_is_not_read_by_numbers_that_do_not_fit(tensors: list[Tensor], says: str) -> None:
    from qwenq.models.native_attention import causal_attention

    with pytest.raises(ValueError, match=says):
        causal_attention(*tensors, 0.2)


@needs_float32
@pytest.mark.parametrize(
    ("starts", "says"),
    [
        (None, "10 queries and 12 keys do not fit: where the queries stand is not told"),
        (torch.tensor([0, 12]), r"queries start at \[0, 12\]; there are 12 slots"),
        (torch.tensor([-1, 2]), r"queries start at \[-1, 2\]"),
        (torch.tensor([0]), r"starts are torch.int64 \[1\] on cpu, not int64 \[2\]"),
        (torch.tensor([0, 1], dtype=torch.int32), r"starts are torch.int32"),
    ],
)
def test_queries_stand_at_slots_that_there_are(starts: Tensor | None, says: str) -> None:
    from qwenq.models.native_attention import causal_attention

    with pytest.raises(ValueError, match=says):
        causal_attention(drawn(0, 2, 4, 10, 32), drawn(0, 2, 2, 12, 32), drawn(0, 2, 2, 12, 32), 0.2, starts)


WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


@in_both
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("qwen2", WINDOW)]
)
def test_blocks_take_it_and_come_as_near_to_float64(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 70 tokens most lie beyond the window: there a mask comes, and torch's attention with it."""
    folder = write_family(tmp_path / "model", family, **changes)
    tokens = torch.randint(0, 90, (3, 70), generator=torch.Generator().manual_seed(0))

    def after_blocks(dtype: torch.dtype) -> tuple[str, Tensor]:
        decoder = BlockwiseDecoder(open_checkpoint(folder), CPU, dtype)
        with torch.inference_mode():
            (hidden,) = decoder.embed([tokens])
            for index in range(len(decoder.names)):
                with decoder.block(index) as block:
                    hidden = decoder.forward(block, hidden)
        return decoder.attention, hidden.double()

    name, exact = after_blocks(torch.float64)
    assert name == TORCH
    name, compiled = after_blocks(dtype)
    assert name == NATIVE
    monkeypatch.setattr(support, "why_not", lambda *features: "not today")
    name, plain = after_blocks(dtype)
    assert name == TORCH
    assert (compiled - exact).norm() <= 1.2 * (plain - exact).norm()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "because", "missed"),
    [
        ("cuda", torch.bfloat16, 64, "cuda", False),
        ("cpu", torch.float64, 64, "float64", False),
        ("cpu", torch.float16, 64, "float16", False),
        ("cpu", torch.bfloat16, 24, "24, is no multiple of 16", True),
        ("cpu", torch.float32, 24, "24, is no multiple of 16", True),
    ],
)
def test_elsewhere_it_is_torchs_and_what_is_missed_is_said(
    device: str, dtype: torch.dtype, head_dim: int, because: str, missed: bool
) -> None:
    place = torch.device(device)
    assert attention_of(place, dtype, head_dim) == TORCH
    assert because in str(why_not(place, dtype, head_dim))
    assert (passed_over(place, dtype, head_dim) is not None) == missed


def test_a_decoder_knows_why_its_attention_is_torchs(tmp_path: Path) -> None:
    model = open_checkpoint(write_family(tmp_path / "m", head_dim=24))
    decoder = BlockwiseDecoder(model, CPU, torch.bfloat16)
    assert decoder.attention == TORCH
    assert decoder.attention_why_not == "the width of a head, 24, is no multiple of 16"
    assert str(decoder.passed_over).endswith(decoder.attention_why_not)
    assert BlockwiseDecoder(model, CPU, torch.float16).passed_over is None


def test_layers_that_slide_a_window_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "why_not", lambda *features: None)  # nothing is run here
    plain, sliding = (
        BlockwiseDecoder(
            open_checkpoint(write_family(tmp_path / name, "qwen2", **changes)), CPU, torch.bfloat16
        )
        for name, changes in (("plain", {}), ("sliding", WINDOW))
    )
    assert plain.attention == sliding.attention == NATIVE
    assert plain.passed_over is None
    assert "attention of 2 of 3 layers slides a window of 8 tokens" in str(sliding.passed_over)
