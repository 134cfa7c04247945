"""Causal attention of every variant, beside float64 and torch's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compute.conftest import NAMES, lower
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qwenq.compute.attention import causal_attention, unsupported_reason

in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, params=[*NAMES, "torch"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test with each variant and with torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("QWENQ_CPU", "torch")
            yield "torch"
        else:
            yield lower(request.param, patch)


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
    d=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
    scale=st.sampled_from([0.05, 0.3, 2.0]),
)
def test_any_shape_is_as_near_to_float64_as_torchs_own(
    dtype: torch.dtype, batch: int, kv_heads: int, sharing: int, tokens: int, d: int, scale: float
) -> None:
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
    q, k, v = (drawn(i, 2, 4, 100, 32, dtype=dtype) for i in range(3))
    apart = {"rtol": 2**-6, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    whole = causal_attention(q, k, v, 0.2)
    for start, end in ((0, 8), (5, 48), (48, 97), (99, 100)):
        part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        got = causal_attention(*part, 0.2, torch.full((2,), start))
        torch.testing.assert_close(got, whole[:, start:end], **apart)


@in_both
def test_what_comes_later_changes_nothing(dtype: torch.dtype, variant: str) -> None:
    q, k, v = (drawn(i, 2, 2, 100, 32, dtype=dtype) for i in range(3))
    whole = causal_attention(q, k, v, 0.2)
    for tokens in (1, 37, 64):
        part = causal_attention(*(x[:, :, :tokens] for x in (q, k, v)), 0.2)
        last = {torch.bfloat16: 2**-7, torch.float32: 1e-5}[dtype] if variant == "torch" else 0.0
        torch.testing.assert_close(part, whole[:, :tokens], rtol=last, atol=last)


@in_both
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype) -> None:
    q, k, v = (drawn(i, 1, 1, 20, 16, dtype=dtype) for i in range(3))
    k[0, 0, 10, 3] = float("nan")
    assert not causal_attention(q, k, v, 0.2)[0, 10:].isfinite().any()


def wrong(**changes: Tensor) -> list[Tensor]:
    """Sound q, k, v of 4 heads that share 2, but for these."""
    fitting = {name: drawn(0, 2, heads, 10, 32) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return list((fitting | changes).values())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (wrong(q=drawn(0, 2, 4, 10, 32).bfloat16()), r"k is torch\.float32 .* as q is"),
        (wrong(v=drawn(0, 2, 2, 10, 32).half()), r"v is torch\.float16"),
        (wrong(k=drawn(0, 2, 2, 10, 32).to("meta")), "k is .* on meta"),
        (wrong(q=drawn(0, 4, 10, 32)), r"q is .*\[4, 10, 32\]"),
        (wrong(q=drawn(0, 2, 3, 10, 32)), "3 heads cannot share 2"),
        (wrong(k=drawn(0, 2, 0, 10, 32), v=drawn(0, 2, 0, 10, 32)), "4 heads cannot share 0"),
        (wrong(k=drawn(0, 2, 2, 9, 32), v=drawn(0, 2, 2, 9, 32)), "do not fit"),
        (wrong(v=drawn(0, 2, 2, 9, 32)), r"v \[2, 2, 9, 32\] do not fit"),
        (wrong(v=drawn(0, 2, 2, 10, 16)), "do not fit"),
        (wrong(k=drawn(0, 1, 2, 10, 32)), "do not fit"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: list[Tensor], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        causal_attention(*tensors, 0.2)


@pytest.mark.parametrize(
    ("starts", "says"),
    [
        (None, "10 queries and 12 keys do not fit without starts"),
        (torch.tensor([0, 12]), r"queries start at \[0, 12\]; there are 12 slots"),
        (torch.tensor([-1, 2]), r"queries start at \[-1, 2\]"),
        (torch.tensor([0]), r"starts are torch.int64 \[1\] on cpu, not int64 \[2\]"),
        (torch.tensor([0, 1], dtype=torch.int32), r"starts are torch.int32"),
    ],
)
def test_queries_stand_at_slots_that_there_are(starts: Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        causal_attention(drawn(0, 2, 4, 10, 32), drawn(0, 2, 2, 12, 32), drawn(0, 2, 2, 12, 32), 0.2, starts)


def test_a_scale_is_above_zero() -> None:
    with pytest.raises(ValueError, match="scale of the scores is 0"):
        causal_attention(*wrong(), 0.0)


@pytest.mark.parametrize(
    ("dtype", "d", "because"),
    [
        (torch.float16, 32, "not for float16"),
        (torch.float64, 32, "float64"),
        (torch.float32, 24, "24, is no"),
    ],
)
def test_other_dtypes_and_widths_are_torchs(dtype: torch.dtype, d: int, because: str) -> None:
    assert because in str(unsupported_reason(torch.device("cpu"), dtype, d))
    q, k, v = (drawn(i, 1, 2, 10, d, dtype=dtype) for i in range(3))
    assert torch.equal(causal_attention(q, k, v, 0.2), by_torch(q, k, v, 0.2))


def test_any_number_of_threads_gives_the_same() -> None:
    q, k, v = (drawn(i, 2, 3, 77, 64) for i in range(3))
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(causal_attention(q, k, v, 0.2))
    torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
