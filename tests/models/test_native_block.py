"""Norms, rotary positions and the gated activation as compiled code, beside float64 and transformers'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.native_functions import in_both, needs_bfloat16, needs_float32
from torch import Tensor
from torch.nn import functional

from qwenq.models.native_block import rms_norm, rotate_, swiglu, swiglu_

pytestmark = needs_float32

LAST = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}  # the unit of a number's last bit beside it
WIDTHS = st.sampled_from([16, 48, 64, 80, 128, 576])


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    module = Qwen3RMSNorm(len(weight), eps)
    module.weight.data = weight
    with torch.no_grad():
        out: Tensor = module(x)
    return out


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    return turned


def rarely_apart(got: Tensor, plain: Tensor) -> None:
    """Equal but for the last bits; in bfloat16 in a few of many places."""
    assert got.dtype is plain.dtype and got.shape == plain.shape
    if got.dtype is torch.bfloat16:
        apart = (got != plain).sum().item()
        assert apart <= 2 + 0.005 * plain.numel()
    # Two roundings in a row may each fall to the other side: two units of the last bit, of float32 some more.
    torch.testing.assert_close(got, plain, rtol=4 * LAST[got.dtype], atol=1e-30)


@in_both
@settings(max_examples=40)
@given(rows=st.integers(1, 70), d=WIDTHS, scale=st.sampled_from([1e-4, 1.0, 300.0]))
def test_a_norm_is_transformers(dtype: torch.dtype, rows: int, d: int, scale: float) -> None:
    x, weight = scale * drawn(rows, 2, rows, d, dtype=dtype), drawn(1, d, dtype=dtype)
    got = rms_norm(x, weight, 1e-6)
    rarely_apart(got, plain_norm(x, weight, 1e-6))
    exact = functional.rms_norm(x.double(), (d,), weight.double(), 1e-6)
    torch.testing.assert_close(got.double(), exact, rtol=4 * LAST[dtype], atol=1e-30)


@in_both
def test_a_norm_takes_any_strides_and_keeps_its_input(dtype: torch.dtype) -> None:
    whole = drawn(0, 6, 5, 96, dtype=dtype)
    before = whole.clone()
    for x in (whole[:, ::2, 32:64], whole.transpose(0, 1), whole[0, 0], whole[:0]):
        weight = drawn(1, 2 * x.shape[-1], dtype=dtype)[::2]
        assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.clone(), weight.clone(), 1e-5))
    assert torch.equal(whole, before)


@in_both
@pytest.mark.parametrize("value", [3e38, -3e38, 1e-38, 0.0, float("nan"), float("inf")])
def test_a_norm_of_extremes_is_transformers(dtype: torch.dtype, value: float) -> None:
    x = drawn(0, 3, 32, dtype=dtype)
    x[1, 5] = value
    weight = torch.ones(32, dtype=dtype)
    got, plain = rms_norm(x, weight, 1e-6), plain_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, plain, rtol=4 * LAST[dtype], atol=0, equal_nan=True)
    assert got[1].isnan().any() == (not torch.tensor(value).isfinite())


@in_both
@settings(max_examples=40)
@given(rows=st.integers(1, 70), d=WIDTHS, scale=st.sampled_from([0.01, 1.0, 20.0]))
def test_the_activation_is_torchs(dtype: torch.dtype, rows: int, d: int, scale: float) -> None:
    gate, up = scale * drawn(rows, 3, rows, d, dtype=dtype), drawn(1, 3, rows, d, dtype=dtype)
    plain = functional.silu(gate) * up
    exact = functional.silu(gate.double()) * up.double()
    got = swiglu_(gate, up)
    assert got is gate
    rarely_apart(got, plain)
    torch.testing.assert_close(got.double(), exact, rtol=4 * LAST[dtype], atol=1e-30)


@needs_bfloat16
def test_the_activation_of_every_bfloat16_is_torchs() -> None:
    """NaN among them: that stays one, and nothing else becomes one but as in torch."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).reshape(-1, 16)
    plain = functional.silu(gate)
    got = swiglu_(gate.clone(), torch.ones_like(gate))
    # Where torch's power is infinite a little later, what is left is below 1e-35.
    torch.testing.assert_close(got, plain, rtol=2**-7, atol=1e-35, equal_nan=True)
    assert (got != plain).logical_and(plain.abs() > 1e-35).sum() < 30
    up = drawn(0, *gate.shape, dtype=torch.bfloat16)
    up[7, 7] = float("nan")
    assert swiglu_(gate.clone(), up)[7, 7].isnan()


def test_the_activation_of_every_65536th_float32_is_torchs() -> None:
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).mul(2**16).add(12345).view(torch.float32)
    plain = functional.silu(gate).reshape(-1, 16)
    got = swiglu_(gate.clone().reshape(-1, 16), torch.ones(2**12, 16))
    torch.testing.assert_close(got, plain, rtol=2**-20, atol=1e-35, equal_nan=True)


@in_both
def test_the_activation_takes_any_strides_of_the_second(dtype: torch.dtype) -> None:
    gate, up = drawn(0, 7, 48, dtype=dtype), drawn(1, 48, 14, dtype=dtype).T[::2]
    assert torch.equal(swiglu_(gate.clone(), up), swiglu_(gate.clone(), up.clone()))


@in_both
@settings(max_examples=20)
@given(rows=st.integers(0, 70), d=WIDTHS)
def test_the_activation_of_one_tensor_is_that_of_its_halves(dtype: torch.dtype, rows: int, d: int) -> None:
    both = drawn(rows, 2, rows, 2 * d, dtype=dtype)
    kept = both.clone()
    got = swiglu(both)
    gate, up = kept.chunk(2, dim=-1)
    assert got.is_contiguous() and torch.equal(got, swiglu_(gate.contiguous(), up))
    assert torch.equal(both, kept)


@in_both
@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.one_of(st.integers(1, 20), st.just(301)),
    kv_heads=st.integers(1, 3),
    sharing=st.integers(1, 3),
    d=st.sampled_from([16, 32, 48, 64, 80, 128]),
    of_each=st.booleans(),
)
def test_rotation_is_transformers_to_the_bit(
    dtype: torch.dtype, batch: int, tokens: int, kv_heads: int, sharing: int, d: int, of_each: bool
) -> None:
    # Queries, keys and values of one tensor: what is not turned must stay.
    whole = drawn(tokens, batch, tokens, (sharing + 2) * kv_heads, d, dtype=dtype)
    q, k, v = whole.split([sharing * kv_heads, kv_heads, kv_heads], 2)
    angles = 9 * drawn(1, batch if of_each else 1, tokens, d)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    plain, values = plain_rotary(q, k, cos, sin), v.clone()
    rotate_(q, k, cos, sin)
    assert torch.equal(q, plain[0]) and torch.equal(k, plain[1]) and torch.equal(v, values)


@in_both
def test_rotation_hides_nothing_and_takes_any_strides_of_tables(dtype: torch.dtype) -> None:
    q, k = drawn(0, 2, 5, 3, 32, dtype=dtype), drawn(1, 2, 5, 1, 32, dtype=dtype)
    q[1, 2, 1, 3], k[0, 0, 0, 20] = float("nan"), float("inf")
    cos, sin = drawn(2, 1, 32, 5, dtype=dtype).transpose(1, 2), drawn(3, 1, 10, 32, dtype=dtype)[:, ::2]
    plain = plain_rotary(q, k, cos, sin)
    rotate_(q, k, cos, sin)
    for got, expected in zip((q, k), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert q[1, 2, 1, 3].isnan() and q[1, 2, 1, 19].isnan()


ROWS, TURNED, TABLE = drawn(0, 4, 32), drawn(1, 2, 5, 3, 32), drawn(2, 1, 5, 32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: rms_norm(ROWS.half(), ROWS[0].half(), 1e-6),
            r"x is torch\.float16 .* not bfloat16 or float32",
        ),
        (lambda: rms_norm(ROWS, ROWS[0].bfloat16(), 1e-6), r"weight is torch\.bfloat16 .* not float32"),
        (lambda: rms_norm(ROWS.bfloat16(), ROWS[0], 1e-6), r"weight is torch\.float32 .* not bfloat16"),
        (lambda: rms_norm(ROWS.to("meta"), ROWS[0], 1e-6), "x is .* on meta"),
        (lambda: rms_norm(ROWS, ROWS[0, :16], 1e-6), r"a weight \[16\] does not fit"),
        (lambda: rms_norm(ROWS[:, :24], ROWS[0, :24], 1e-6), r"x \[4, 24\] .* no multiple of 16"),
        (lambda: rms_norm(drawn(0), ROWS[0], 1e-6), r"x \[\] "),
        (lambda: swiglu_(ROWS.clone(), ROWS.half()), r"up is torch\.float16"),
        (lambda: swiglu_(ROWS.clone(), ROWS[:3]), "not of the shape"),
        (lambda: swiglu_(ROWS.T.clone().T[:, :16], ROWS[:, :16]), "not contiguous"),
        (lambda: swiglu_(drawn(0, 2, 24), drawn(0, 2, 24)), "no multiple of 16"),
        (lambda: swiglu(ROWS.half()), r"gate is torch\.float16"),
        (lambda: swiglu(ROWS[:, :31]), "no multiple of 16"),
        (lambda: swiglu(drawn(0, 2, 48)), "no multiple of 16"),
        (lambda: swiglu(drawn(0, 64, 4).T), "gate and up"),
        (lambda: rotate_(TURNED.double(), TURNED, TABLE, TABLE), r"q is torch\.float64"),
        (lambda: rotate_(TURNED, TURNED, TABLE, TABLE.bfloat16()), r"sin is torch\.bfloat16"),
        (lambda: rotate_(TURNED[..., :24], TURNED, TABLE, TABLE), r"q is \[2, 5, 3, 24\]"),
        (lambda: rotate_(TURNED, TURNED[0], TABLE, TABLE), r"k is \[5, 3, 32\]"),
        (lambda: rotate_(TURNED, TURNED[:, :4], TABLE, TABLE), "do not fit"),
        (lambda: rotate_(TURNED, TURNED, TABLE[:, :4], TABLE), "do not fit"),
        (lambda: rotate_(TURNED, TURNED, TABLE, TABLE.expand(3, -1, -1)), "do not fit"),
        (lambda: rotate_(TURNED.transpose(1, 2), TURNED, TABLE, TABLE), "beside each other"),
        (lambda: rotate_(TURNED[..., ::2], TURNED, TABLE, TABLE), "beside each other"),
        (lambda: rotate_(TURNED[:1].expand(2, -1, -1, -1), TURNED, TABLE, TABLE), "share memory"),
    ],
)
def test_memory_is_not_touched_by_numbers_that_do_not_fit(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
