"""The columns of a lazy block on a GPU, by one kernel: torch would launch ten for each column.

A program takes some rows of W through all columns of the block. What a column's error changes in those that
follow lies in memory between two columns, where the program's own loads find it in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.compute.columns import Block

ROWS, AHEAD = 32, 16
"""Of a program; and the columns that an error is pushed onto at a time."""


@triton.jit
def nearest(w: tl.tensor, scale: tl.tensor, zero: tl.tensor, levels: tl.tensor) -> tl.tensor:
    """clamp(round(w / scale + zero), 0, levels), of two the even one."""
    q = tl.minimum(tl.maximum(tl.div_rn(w, scale) + zero, 0.0), levels.to(tl.float32))
    return (q + 8388608.0) - 8388608.0


@triton.jit
def push(
    columns: tl.tensor, factors: tl.tensor, stride: tl.tensor, error: tl.tensor, i: tl.tensor,
    row: tl.tensor, inside: tl.tensor, rows: tl.tensor, COUNT: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Subtract factor · error from the columns behind column i; its factors lie a stride apart."""
    for first in range(i + 1, COUNT, AHEAD):
        ahead = first + tl.arange(0, AHEAD)
        place = columns + ahead[:, None] * rows + row[None, :]
        both = (ahead < COUNT)[:, None] & inside[None, :]
        u = tl.load(factors + ahead * stride, ahead < COUNT, 0.0)
        tl.store(place, tl.load(place, both, 0.0) - u[:, None] * error[None, :], both)
    tl.debug_barrier()  # other threads of the program read what these have stored


@triton.jit
def _round(
    columns: tl.tensor, U: tl.tensor, scales: tl.tensor, zeros: tl.tensor, groups: tl.tensor,
    integers: tl.tensor, errors: tl.tensor, cost: tl.tensor,
    rows: tl.tensor, u_row: tl.tensor, u_column: tl.tensor, levels: tl.tensor,
    COUNT: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows through COUNT columns: a number of which few differ, so that few kernels are built."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros([ROWS], tl.float32)
    for i in range(COUNT):
        group = tl.load(groups + i) * rows
        scale = tl.load(scales + group + row, inside, 1.0)
        zero = tl.load(zeros + group + row, inside, 0.0)
        w = tl.load(columns + i * rows + row, inside, 0.0)
        q = nearest(w, scale, zero, levels)
        error = tl.div_rn(w - (q - zero) * scale, tl.load(U + i * (u_row + u_column)))
        tl.store(integers + i * rows + row, q.to(tl.uint8), inside)
        tl.store(errors + i * rows + row, error, inside)
        total += error * error
        push(columns, U + i * u_row, u_column, error, i, row, inside, rows, COUNT, AHEAD)
    tl.store(cost + row, total, inside)


def round_by_triton(block: Block) -> Tensor:
    """See ``columns.round_columns``; float32 on a GPU."""
    count, rows = block.columns.shape
    groups = torch.tensor(block.groups, dtype=torch.int32, device=block.columns.device)
    cost = torch.empty_like(block.columns[0])
    with torch.cuda.device_of(block.columns):
        _round[(triton.cdiv(rows, ROWS),)](
            block.columns, block.U, block.scales, block.zeros, groups, block.integers, block.errors, cost,
            rows, *block.U.stride(), block.levels, COUNT=count, ROWS=ROWS, AHEAD=AHEAD, num_warps=1,
        )  # fmt: skip
    return cost
