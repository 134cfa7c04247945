"""Norms, rotary positions and the gated activation, of every variant, beside float64 and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from compute.conftest import NAMES, lower
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qwenq.compute import cpu
from qwenq.compute.block import fallback_notice, rms_norm, rotate, swiglu, unsupported_reason

LAST = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}  # the unit of a number's last bit beside it
WIDTHS = st.sampled_from([16, 48, 64, 80, 128, 576])
in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, params=NAMES)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run each test with each variant; not by ``monkeypatch``, which hypothesis refuses."""
    with pytest.MonkeyPatch.context() as patch:
        yield lower(request.param, patch)


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


def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, tokens, 1, d] with the sign of the rotation, of transformers' tables."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=20)
@given(rows=st.integers(1, 70), d=WIDTHS)
def test_a_norm_with_float32_weights_rounds_once(dtype: torch.dtype, rows: int, d: int) -> None:
    x, weights = drawn(0, rows, 3, d, dtype=dtype), drawn(1, 3, d)
    exact = functional.rms_norm(x.double(), (d,), None, 1e-6) * weights.double()
    got = rms_norm(x, weights, 1e-6)
    assert got.dtype is dtype
    assert (got != exact.to(dtype)).sum() <= 2 + 0.005 * x.numel()
    torch.testing.assert_close(got.double(), exact, rtol=LAST.get(dtype, 2.0**-10), atol=1e-7)


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
    got = swiglu(gate, up, out=gate)
    assert got is gate
    rarely_apart(got, plain)
    torch.testing.assert_close(got.double(), exact, rtol=4 * LAST[dtype], atol=1e-30)


def test_the_activation_of_every_bfloat16_is_torchs() -> None:
    """NaN among them: that stays one, and nothing else becomes one but as in torch."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).reshape(-1, 16)
    plain = functional.silu(gate)
    got = swiglu(gate, torch.ones_like(gate))
    # Where torch's power is infinite a little later, what is left is below 1e-35.
    torch.testing.assert_close(got, plain, rtol=2**-7, atol=1e-35, equal_nan=True)
    assert (got != plain).logical_and(plain.abs() > 1e-35).sum() < 30
    up = drawn(0, *gate.shape, dtype=torch.bfloat16)
    up[7, 7] = float("nan")
    assert swiglu(gate, up)[7, 7].isnan()


def test_the_activation_of_every_65536th_float32_is_torchs() -> None:
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).mul(2**16).add(12345).view(torch.float32)
    plain = functional.silu(gate).reshape(-1, 16)
    got = swiglu(gate.reshape(-1, 16), torch.ones(2**12, 16))
    torch.testing.assert_close(got, plain, rtol=2**-20, atol=1e-35, equal_nan=True)


@in_both
def test_the_activation_takes_any_strides(dtype: torch.dtype) -> None:
    gate, up = drawn(0, 7, 48, dtype=dtype), drawn(1, 48, 14, dtype=dtype).T[::2]
    assert torch.equal(swiglu(gate, up), swiglu(gate, up.clone()))


@in_both
@settings(max_examples=20)
@given(rows=st.integers(0, 70), d=WIDTHS)
def test_halves_of_one_product_are_taken_as_they_lie(dtype: torch.dtype, rows: int, d: int) -> None:
    both = drawn(rows, 2, rows, 2 * d, dtype=dtype)
    gate, up = both.chunk(2, dim=-1)
    got = swiglu(gate, up)
    assert got.is_contiguous() and torch.equal(got, swiglu(gate.contiguous(), up.contiguous()))


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
    found = [rotate(x, *tables(cos, sin)) for x in (q, k)]
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]) and torch.equal(v, values)


@in_both
def test_rotation_hides_nothing_and_takes_any_strides_of_tables(dtype: torch.dtype) -> None:
    q, k = drawn(0, 2, 5, 3, 32, dtype=dtype), drawn(1, 2, 5, 1, 32, dtype=dtype)
    q[1, 2, 1, 3], k[0, 0, 0, 20] = float("nan"), float("inf")
    cos, sin = drawn(2, 1, 32, 5, dtype=dtype).transpose(1, 2), drawn(3, 1, 10, 32, dtype=dtype)[:, ::2]
    plain = plain_rotary(q, k, cos, sin)
    found = [rotate(x, *tables(cos, sin)) for x in (q, k)]
    for got, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert found[0][1, 2, 1, 3].isnan() and found[0][1, 2, 1, 19].isnan()


@settings(max_examples=20)
@given(tokens=st.integers(1, 20), d=st.sampled_from([16, 48, 64, 128]))
def test_float32_tables_rotate_bfloat16_in_float32(tokens: int, d: int) -> None:
    """As of Qwen v1: the result alone is rounded."""
    x = drawn(0, 2, tokens, 5, d, dtype=torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = tables(drawn(1, 1, tokens, d), drawn(2, 1, tokens, d))
    exact = x.double() * cos.double() + x.double().roll(d // 2, -1) * sin.double()
    got = rotate(x, cos, sin)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


@in_both
def test_each_head_may_have_a_weight_of_its_own(dtype: torch.dtype) -> None:
    x, weight = drawn(0, 2, 7, 5, 48, dtype=dtype)[:, :, 1:], drawn(1, 4, 48, dtype=dtype)
    got = rms_norm(x, weight, 1e-6)
    for head in range(4):
        assert torch.equal(got[:, :, head], rms_norm(x[:, :, head], weight[head], 1e-6))


@in_both
def test_torch_computes_the_same_where_no_kernel_runs(dtype: torch.dtype, variant: str) -> None:
    x, gate, up = (
        drawn(0, 2, 9, 4, 32, dtype=dtype),
        drawn(1, 9, 64, dtype=dtype),
        drawn(2, 9, 64, dtype=dtype),
    )
    weights, turn = drawn(3, 4, 32, dtype=dtype), tables(*(drawn(i, 1, 9, 32, dtype=dtype) for i in (4, 5)))

    def results() -> list[Tensor]:
        norms = [rms_norm(x, weight, 1e-6) for weight in (weights, weights[0])]
        return [*norms, swiglu(gate, up), swiglu(gate, up, out=gate.clone()), rotate(x.clone(), *turn)]

    found = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.VARIABLE, "torch")
        plain = results()
    for ours, torchs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=4 * LAST[dtype], atol=2 * LAST[dtype])


def test_other_dtypes_and_widths_run_in_torch_with_a_notice() -> None:
    place = torch.device("cpu")
    assert unsupported_reason(place, torch.float32, {"a head": 64}) is None
    assert fallback_notice("norms", place, torch.bfloat16, {"a head": 64}) is None
    assert "cuda" in str(unsupported_reason(torch.device("cuda"), torch.float32))
    assert "not for float16" in str(unsupported_reason(place, torch.float16))
    assert fallback_notice("norms", place, torch.float16) is None, "there is none: nothing is missed"
    said = "norms run in torch, which takes longer, because the width of a head, 24, is not a multiple of 16"
    assert fallback_notice("norms", place, torch.float32, {"a head": 24}) == said
    x = drawn(0, 3, 24).half()
    assert torch.equal(rms_norm(x, x[0], 1e-6), functional.rms_norm(x, (24,), x[0], 1e-6))


ROWS, TURNED, TABLE = drawn(0, 4, 32), drawn(1, 2, 5, 3, 32), drawn(2, 1, 5, 1, 32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: rms_norm(ROWS, ROWS[0].bfloat16(), 1e-6),
            r"weight is torch\.bfloat16 .* x is torch.float32",
        ),
        (lambda: rms_norm(ROWS.to("meta"), ROWS[0], 1e-6), "x is .* on meta"),
        (lambda: rms_norm(ROWS, ROWS[0, :16], 1e-6), r"a weight \[16\] does not fit"),
        (lambda: rms_norm(ROWS, ROWS[:3], 1e-6), r"a weight \[3, 32\] does not fit"),
        (lambda: rms_norm(drawn(0), ROWS[0], 1e-6), "x is a number"),
        (lambda: swiglu(ROWS, ROWS.half()), r"up is torch\.float16"),
        (lambda: swiglu(ROWS, ROWS[:3]), "do not fit"),
        (lambda: swiglu(ROWS, ROWS, out=ROWS.T.contiguous().T), "do not fit"),
        (lambda: swiglu(ROWS, ROWS, out=ROWS[:3].clone()), "do not fit"),
        (lambda: rotate(TURNED.double(), TABLE.bfloat16(), TABLE.bfloat16()), r"cos is torch\.bfloat16"),
        (lambda: rotate(TURNED.bfloat16(), TABLE, TABLE.bfloat16()), r"sin is torch\.bfloat16"),
        (lambda: rotate(TURNED[0], TABLE, TABLE), r"x is \[5, 3, 32\]"),
        (lambda: rotate(TURNED, TABLE[:, :4], TABLE), r"cos \[1, 4, 1, 32\] does not fit"),
        (lambda: rotate(TURNED, TABLE, TABLE.expand(3, -1, -1, -1)), "sin .* does not fit"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_heads_of_any_strides_are_rotated() -> None:
    plain = rotate(TURNED.clone(), TABLE, TABLE)
    for x in (
        TURNED.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([TURNED, TURNED], -1)[..., 0],
    ):
        assert torch.equal(rotate(x.clone(memory_format=torch.preserve_format), TABLE, TABLE), plain)
    shared = TURNED[:1].expand(2, -1, -1, -1)
    assert torch.equal(rotate(shared, TABLE, TABLE), plain[:1].expand(2, -1, -1, -1))
