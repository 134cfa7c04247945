"""Every kernel of the table against float64, on random shapes, groups, bits, rows and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime.packed_layers import random_case

from qwenq.compute import cpu
from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.linear import Dense, LinearShape, Requirements, stacked
from qwenq.runtime.quantised_linear import KERNELS, CpuNative, Dequantise, Int8Head, choose

CPU = torch.device("cpu")
# What rounding makes of a product, relative to its norm: scales, weights or result once each.
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
needs_c = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=f"{cpu.unsupported_reason()}")


def assert_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    expected = x.double() @ weight.t() + bias.double()
    assert found.dtype == x.dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < PRECISION[x.dtype]


def check(kernel: type, case, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = case.weight.shape
    x = torch.randn(rows, in_features, generator=generator).to(case.need.dtype)
    bias = torch.randn(out_features, generator=generator).to(case.need.dtype)
    layer = kernel(case.packed, case.need, bias)
    with torch.inference_mode():
        assert_product(layer(x), x, case.weight, bias)
        assert torch.equal(layer(x.view(1, rows, -1))[0], layer(x))
    assert layer.nbytes > 0


@given(
    bits=st.sampled_from((2, 4, 8)),
    group_size=st.sampled_from((32, 64, 128, -1)),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    rows=st.sampled_from((1, 2, 5, 15, 16, 17, 70)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    sym=st.booleans(),
    shuffled=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_every_supported_kernel_agrees_with_float64(
    bits: int,
    group_size: int,
    widths: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    sym: bool,
    shuffled: bool,
    seed: int,
) -> None:
    in_features, out_features = 128 * widths[0], 64 * widths[1]
    case = random_case(
        bits, group_size, in_features, out_features, seed=seed, sym=sym, shuffled=shuffled, dtype=dtype
    )
    able = [kernel for kernel in KERNELS if kernel.unsupported_reason(case.need) is None]
    assert Dequantise in able
    for kernel in able:
        check(kernel, case, rows, seed)


def need(**changes: object) -> Requirements:
    values = {
        "bits": 4,
        "group_size": 128,
        "checkpoint_format": "gptq",
        "device": CPU,
        "dtype": torch.bfloat16,
        "layers": (LinearShape("q", 256, 128),),
    }
    return Requirements(**{**values, **changes})  # type: ignore[arg-type]


@needs_c
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "it computes in bfloat16, not in float32"),
        ({"bits": 3}, "it holds 2 or 4 or 8 bits, not 3"),
        ({"device": torch.device("cuda")}, "it runs on the CPU, not on cuda"),
        ({"group_size": 16}, "a group of q has 16 columns"),
        ({"layers": (LinearShape("k", 256, 40),)}, "k has 40 outputs"),
        ({"layers": (LinearShape("k", 256, 128, even=False),)}, "the groups of k differ in size"),
    ],
)
def test_a_named_kernel_is_refused_and_never_replaced(changes: dict, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        choose("cpu-native", need(**changes))


@needs_c
def test_auto_chooses_the_fastest_and_notes_what_it_does_not_use() -> None:
    assert choose("auto", need()) == (CpuNative, [])
    notice = "the faster kernel cpu-native is not used because it computes in bfloat16, not in float32"
    assert choose("auto", need(dtype=torch.float32)) == (Dequantise, [notice])
    assert choose("dequantise", need()) == (Dequantise, [])


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="no kernel 'marlin'"):
        choose("marlin", need())


def test_layers_are_stacked_unless_their_columns_are_ordered_differently() -> None:
    first, second = (random_case(4, 32, 128, 64, seed=seed) for seed in (1, 2))
    whole = stacked([first.packed, second.packed])
    assert whole is not None
    x = torch.randn(3, 128)
    found = Dequantise(whole, need(group_size=32, dtype=torch.float32), None)(x)
    expected = x.double() @ torch.cat([first.weight, second.weight]).t()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    shuffled = random_case(4, 32, 128, 64, shuffled=True)
    assert stacked([first.packed, shuffled.packed]) is None


@needs_c
def test_the_int8_head_is_near_the_head_and_its_error_is_that_of_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 96, generator=generator).bfloat16()
    weight[7] = 0
    head, x = Int8Head(weight), torch.randn(3, 96, generator=generator).bfloat16()
    expected = x.double() @ weight.double().t()
    error = (head(x).double() - expected).norm() / expected.norm()
    assert 1e-3 < error < 1e-2
    assert head(x)[:, 7].eq(0).all()
    assert head.nbytes < weight.nbytes * 0.7
    with pytest.raises(UnsupportedError, match="computes in bfloat16"):
        Int8Head.of(Dense(weight.float()))
