"""The scale of a group, by torch and by compiled code, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.compute.columns import Block, fit_by_c, fit_by_torch, fit_scale

pytestmark = pytest.mark.usefixtures("each_variant")


def group(seed: int, rows: int, size: int, levels: int = 15) -> tuple[Block, torch.Tensor]:
    """A group after its integers have moved, and its values before; H is symmetric and positive."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * size, size, generator=draw)
    gradient, errors = (torch.randn(size, rows, generator=draw) for _ in range(2))
    scales = (torch.rand(3, rows, generator=draw) + 0.5).half().float()
    zeros = torch.randint(0, levels + 1, (3, rows), generator=draw).float()
    integers = torch.randint(0, levels + 1, (size, rows), generator=draw, dtype=torch.uint8)
    block = Block(gradient, X.T @ X / size, scales, zeros, [1] * size, levels, integers, errors)
    return block, (integers - zeros[1]) * scales[1] + errors


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(16, 200),
    size=st.sampled_from([1, 8, 64, 128]),
    levels=st.sampled_from([3, 15, 255]),
)
def test_compiled_code_fits_what_float64_fits(seed: int, rows: int, size: int, levels: int) -> None:
    block, values = group(seed, rows, size, levels)
    found = fit_by_c(block, values, 1)
    exact = fit_by_torch(
        block._replace(
            columns=block.columns.double(), U=block.U.double(), zeros=block.zeros.double(),
            scales=block.scales.double(), errors=block.errors.double(),
        ),
        values.double(),
        1,
    )  # fmt: skip
    half = 2.0**-10  # float16's step: two sums may round to its two neighbours
    torch.testing.assert_close(found.scale.double(), exact.scale, rtol=2 * half, atol=1e-6)
    torch.testing.assert_close(found.change.double(), exact.change, rtol=1e-2, atol=1e-3)
    assert torch.equal(found.values, (block.integers - block.zeros[1]) * found.scale)
    assert torch.equal(found.less, values - found.values)
    assert torch.equal(found.scale.half().float(), found.scale)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("gradient", "scale"),
    [(1e30, -65504.0), (-1e30, 65504.0), (float("nan"), 0.75), (float("inf"), 0.75), (0.0, 0.75)],
)
def test_fitted_scales_stay_in_the_range_of_float16(gradient: float, scale: float, compiled: bool) -> None:
    block, values = group(2, 16, 4)
    block.columns.fill_(gradient)
    block.errors.zero_()
    block.scales.fill_(0.75)
    block.integers.fill_(9)
    block.zeros.fill_(8)
    fitted = (fit_by_c if compiled else fit_by_torch)(block, values, 1)
    assert (fitted.scale == scale).all()


def test_fit_returns_the_change_of_the_error() -> None:
    block, values = group(1, 40, 32)
    fitted = fit_scale(block, values, 1)
    assert (fitted.change <= 0).all()
    assert (fitted.change < 0).any()
    u, step = block.integers - block.zeros[1], fitted.scale - block.scales[1]
    gradient = block.columns - block.U @ block.errors
    moved = (u * step).double()
    gained = (moved * gradient).sum(0) + (moved * (block.U.double() @ moved)).sum(0) / 2
    torch.testing.assert_close(
        fitted.change.double(), gained, rtol=1e-3, atol=1e-4 * float(gained.abs().max())
    )


def test_wrong_shapes_dtypes_and_strides_are_refused() -> None:
    block, values = group(0, 32, 8)
    with pytest.raises(ValueError, match=r"errors: torch\.float64"):
        fit_by_c(block._replace(errors=torch.zeros(8, 32).double()), values, 1)
