"""The parabola of a group's scale, by torch and by compiled code, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.gptq.columns import Block, native_why_not
from qwenq.gptq.refit import parabola_by_torch, refit_scale

WHY_NOT = native_why_not(torch.empty(1, 16))
compiled_here = pytest.mark.skipif(WHY_NOT is not None, reason=f"no compiled columns here: {WHY_NOT}")


def group(seed: int, rows: int, size: int, levels: int = 15) -> Block:
    """A group after its integers have moved: anything, as long as H is symmetric and positive."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * size, size, generator=draw)
    gradient, errors = (torch.randn(size, rows, generator=draw) for _ in range(2))
    scales = torch.rand(3, rows, generator=draw).half().float() + 0.5
    zeros = torch.randint(0, levels + 1, (3, rows), generator=draw).float()
    integers = torch.randint(0, levels + 1, (size, rows), generator=draw, dtype=torch.uint8)
    return Block(gradient, X.T @ X / size, scales, zeros, [1] * size, levels, integers, errors)


@compiled_here
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(16, 200),
    size=st.sampled_from([1, 8, 64, 128]),
    levels=st.sampled_from([3, 15, 255]),
)
def test_compiled_code_sums_what_float64_sums(seed: int, rows: int, size: int, levels: int) -> None:
    from qwenq.gptq.native_refit import parabola_natively

    block = group(seed, rows, size, levels)
    exact = block._replace(
        columns=block.columns.double(), U=block.U.double(), zeros=block.zeros.double(),
        scales=block.scales.double(), errors=block.errors.double(),
    )  # fmt: skip
    for ours, theirs in zip(parabola_natively(block, 1), parabola_by_torch(exact, 1), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_only_the_scales_of_the_group_change_and_what_it_says_is_what_is_gained() -> None:
    block = group(1, 40, 32)
    before = block.scales.clone()
    change = refit_scale(block, 1)
    assert (change <= 0).all()
    assert (change < 0).any()
    assert torch.equal(block.scales[[0, 2]], before[[0, 2]])
    u, step = block.integers - block.zeros[1], block.scales[1] - before[1]
    gradient = block.columns - block.U @ block.errors
    moved = (u * step).double()
    gained = (moved * gradient).sum(0) + (moved * (block.U.double() @ moved)).sum(0) / 2
    torch.testing.assert_close(change.double(), gained, rtol=1e-3, atol=1e-4 * float(gained.abs().max()))


@compiled_here
def test_memory_that_is_not_what_it_should_be_is_not_touched() -> None:
    from qwenq.gptq.native_refit import parabola_natively

    with pytest.raises(ValueError, match=r"errors: torch\.float64"):
        parabola_natively(group(0, 32, 8)._replace(errors=torch.zeros(8, 32).double()), 1)
