"""Columns of coordinate descent, moved by torch and by compiled code: the same bits; and what they gain."""

from __future__ import annotations

import pytest
import torch
from gptq.problems import problem
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.compute import cpu
from qwenq.compute.columns import Block, by_c, move_by_torch, move_columns
from qwenq.compute.grid import Grid, search_grid
from qwenq.gptq.solver import output_error

pytestmark = pytest.mark.usefixtures("each_variant")


def started(
    seed: int, rows: int, count: int, *, bits: int = 4, group_size: int = 8, sym: bool = True
) -> tuple[Block, torch.Tensor, torch.Tensor, Grid]:
    """A block at round-to-nearest, its values, the weights and their grid; columns in natural order."""
    given = problem(seed, rows=rows, width=count, tokens=4 * count)
    H = given.H + 0.01 * given.H.diagonal().mean() * torch.eye(count)
    grid = search_grid(given.W, H.diagonal(), bits, group_size, sym=sym, search="none")
    Q = grid.values(grid.integers(given.W))
    scales, zeros = (x.T.contiguous() for x in (grid.scales, grid.zeros))
    groups = [column // group_size for column in range(count)]
    filled = torch.full((count, rows), 255, dtype=torch.uint8), torch.empty(count, rows)
    gradient = (H @ (Q - given.W).T).contiguous()
    return (
        Block(gradient, H, scales, zeros, groups, grid.levels, *filled),
        Q.T.contiguous(),
        given.W,
        grid,
    )


def copied(one: Block) -> Block:
    return one._replace(columns=one.columns.clone(), integers=one.integers.clone(), errors=one.errors.clone())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(16, 150),
    count=st.sampled_from([8, 24, 64, 80]),
    bits=st.sampled_from([2, 4, 8]),
    sym=st.booleans(),
)
def test_any_block_comes_out_the_same_bit_for_bit(
    seed: int, rows: int, count: int, bits: int, sym: bool
) -> None:
    one, values, _, _ = started(seed, rows, count, bits=bits, sym=sym)
    fast, slow = copied(one), copied(one)
    ours, theirs = by_c(fast, values), move_by_torch(slow, values)
    assert torch.equal(fast.integers, slow.integers)
    assert torch.equal(fast.errors, slow.errors)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_moves_return_the_change_of_the_error() -> None:
    block, values, W, grid = started(3, 40, 64)
    gain = move_columns(copied(block), values)
    moved = copied(block)
    move_columns(moved, values)
    before = output_error(W, values.T, block.U)
    after = output_error(W, grid.values(moved.integers.T), block.U)
    torch.testing.assert_close(after - before, gain, rtol=1e-3, atol=1e-4 * float(before.max()))
    assert float(gain.sum()) < -0.1 * float(before.sum())
    torch.testing.assert_close(values - moved.errors, grid.values(moved.integers.T).T)


def test_wrong_shapes_dtypes_and_strides_are_refused() -> None:
    block, values, _, _ = started(0, 32, 24)
    with pytest.raises(ValueError, match=r"values: torch.float32 \[24, 31\]"):
        by_c(block, values[:, 1:].contiguous())


def test_without_c_torch_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    block, values, _, _ = started(0, 20, 24)
    ours, plain = copied(block), copied(block)
    assert torch.equal(move_columns(ours, values), move_by_torch(plain, values))
    assert torch.equal(ours.integers, plain.integers)
