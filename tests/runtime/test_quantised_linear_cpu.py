"""Integer products on a CPU: as exact as they say, over every layout; what is not finite stays so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime.packed_layers import random_case

from qwenq.runtime.quantised_linear import CpuNative

pytestmark = pytest.mark.usefixtures("each_variant")


BFLOAT16 = 2.0**-8  # the most that rounding to bfloat16 changes, of a number


def layer_of(bits: int, group_size: int, in_features: int, out_features: int, **how: object) -> tuple:
    case = random_case(bits, group_size, in_features, out_features, **how)  # type: ignore[arg-type]
    assert CpuNative.unsupported_reason(case.need) is None
    return CpuNative(case.packed, case.need, None), case.weight


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 512, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_group_sizes(bits: int, group_size: int, sym: bool) -> None:
    layer, weight = layer_of(bits, group_size, 3 * 512, 96, sym=sym)
    for rows in (1, CpuNative.many_rows):
        x = torch.randn(rows, 3 * 512).bfloat16()
        exact = x.double() @ weight.t()
        assert (layer(x).double() - exact).norm() / exact.norm() < BFLOAT16


@given(
    bits=st.sampled_from((4, 8)),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    rows=st.integers(1, 13),
    seed=st.integers(0, 1000),
)
def test_few_rows_are_rounded_once(bits: int, widths: tuple[int, int], rows: int, seed: int) -> None:
    """The result's own rounding is nearly all of the error: activations count as more than bfloat16 holds."""
    layer, weight = layer_of(bits, 32, 64 * widths[0], 32 * widths[1], seed=seed)
    x = torch.randn(rows, 64 * widths[0], generator=torch.Generator().manual_seed(seed)).bfloat16()
    exact = x.double() @ weight.t()
    scale = x.double().abs() @ weight.abs().t()  # what sums are made of
    assert ((layer(x).double() - exact).abs() <= BFLOAT16 * exact.abs() + 1e-4 * scale).all()


def test_rows_do_not_see_each_other() -> None:
    layer, _ = layer_of(4, 64, 256, 64)
    x = torch.randn(9, 256).bfloat16()
    alone = torch.cat([layer(row.unsqueeze(0)) for row in x])
    assert torch.equal(layer(x), alone)


def test_a_huge_activation_spoils_its_own_group_alone() -> None:
    layer, weight = layer_of(4, 32, 128, 64)
    x = torch.randn(1, 128).bfloat16()
    x[0, 5] = 3e4
    quiet = x.clone()
    quiet[0, :32] = 0
    exact = quiet.double() @ weight.t()
    assert (layer(quiet).double() - exact).norm() / exact.norm() < BFLOAT16
    exact = x.double() @ weight.t()
    assert (layer(x).double() - exact).norm() / exact.norm() < BFLOAT16


@pytest.mark.parametrize("rows", [1, 3, CpuNative.many_rows])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_lost(rows: int, odd: float) -> None:
    layer, _ = layer_of(4, 64, 128, 64)
    x = torch.zeros(rows, 128).bfloat16()
    x[-1, 70] = odd
    found = layer(x)
    assert not torch.isfinite(found[-1]).any()
    assert torch.equal(found[:-1], torch.zeros(rows - 1, 64).bfloat16())


def test_zeros_stay_zeros() -> None:
    layer, _ = layer_of(8, 64, 128, 64)
    assert torch.equal(layer(torch.zeros(2, 128).bfloat16()), torch.zeros(2, 64).bfloat16())


def test_many_rows_are_multiplied_with_the_very_weights() -> None:
    """Each weight is rounded once, from its scaled integer."""
    layer, weight = layer_of(4, 64, 128, 96)
    eye = torch.eye(128).bfloat16()
    assert torch.equal(layer(eye), weight.t().float().bfloat16())


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    from qwenq.runtime.linear import UnpackedLinear

    scales = torch.full((32, 1), 1.0 + 2.0**-15)
    integers = torch.full((32, 64), 9, dtype=torch.uint8)
    layer = CpuNative.of(
        UnpackedLinear(integers, scales, torch.full((32, 1), 8, dtype=torch.uint8), None), bits=4
    )
    assert layer.layer.scales.dtype is torch.float32
    assert layer(torch.full((1, 64), 1.0).bfloat16())[0, 0] == 64


def test_bytes_are_those_that_are_read() -> None:
    layer, _ = layer_of(4, 64, 256, 96)
    assert layer.nbytes == 256 * 96 // 2 + 2 * 96 * 256 // 64
