"""Round or move the columns of a block on a GPU by one kernel: torch would launch ten for each column.

A program takes some rows of W through all columns of the block. What a column's error changes in those that
follow lies in memory between two columns, where the program's own loads find it in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, AHEAD = 32, 16  # rows of a program; and the columns that an error is pushed onto at a time


@triton.jit
def _columns(
    columns: tl.tensor, values: tl.tensor, U: tl.tensor, scales: tl.tensor, zeros: tl.tensor,
    groups: tl.tensor, integers: tl.tensor, errors: tl.tensor, cost: tl.tensor,
    rows: tl.tensor, u_row: tl.tensor, u_column: tl.tensor, levels: tl.tensor,
    MOVES: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Take ROWS rows through COUNT columns, a number of which few differ, so that few kernels are built.

    MOVES: coordinate descent, where columns are gradients G, ``values`` the columns of Q, and U is H.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros([ROWS], tl.float32)
    for i in range(COUNT):
        group = tl.load(groups + i) * rows
        scale = tl.load(scales + group + row, inside, 1.0)
        zero = tl.load(zeros + group + row, inside, 0.0)
        w = tl.load(columns + i * rows + row, inside, 0.0)
        pivot = tl.load(U + i * (u_row + u_column))
        if MOVES:
            before = tl.load(values + i * rows + row, inside, 0.0)
            q = _nearest(before - tl.div_rn(w, pivot), scale, zero, levels)
            error = before - (q - zero) * scale
            total += error * (error * (pivot * 0.5) - w)
        else:
            q = _nearest(w, scale, zero, levels)
            error = tl.div_rn(w - (q - zero) * scale, pivot)
            total += error * error
        tl.store(integers + i * rows + row, q.to(tl.uint8), inside)
        tl.store(errors + i * rows + row, error, inside)
        for first in range(i + 1, COUNT, AHEAD):  # subtract U_ij · error from the columns j > i
            ahead = first + tl.arange(0, AHEAD)
            place = columns + ahead[:, None] * rows + row[None, :]
            both = (ahead < COUNT)[:, None] & inside[None, :]
            u = tl.load(U + i * u_row + ahead * u_column, ahead < COUNT, 0.0)
            tl.store(place, tl.load(place, both, 0.0) - u[:, None] * error[None, :], both)
        tl.debug_barrier()  # other threads of the program read what these have stored
    tl.store(cost + row, total, inside)


@triton.jit
def _nearest(w: tl.tensor, scale: tl.tensor, zero: tl.tensor, levels: tl.tensor) -> tl.tensor:
    """Return clamp(round(w / scale + zero), 0, levels), rounding half to even."""
    q = tl.minimum(tl.maximum(tl.div_rn(w, scale) + zero, 0.0), levels.to(tl.float32))
    return (q + 8388608.0) - 8388608.0


def run_columns(
    columns: Tensor, values: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, groups: list[int], levels: int,
    integers: Tensor, errors: Tensor, *, moves: bool,
) -> Tensor:  # fmt: skip
    """Run the kernel on the parts of a ``columns.Block``, float32 on a GPU; return the costs, [rows]."""
    count, rows = columns.shape
    group_of = torch.tensor(groups, dtype=torch.int32, device=columns.device)
    cost = torch.empty_like(columns[0])
    with torch.cuda.device_of(columns):
        _columns[(triton.cdiv(rows, ROWS),)](
            columns, values, U, scales, zeros, group_of, integers, errors, cost, rows, *U.stride(), levels,
            MOVES=moves, COUNT=count, ROWS=ROWS, AHEAD=AHEAD, num_warps=1,
        )  # fmt: skip
    return cost
