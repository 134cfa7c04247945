"""The columns of a block of coordinate descent on a GPU, by one kernel: see ``moves``, ``triton_columns``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.compute.columns import Block
from qwenq.compute.triton_columns import AHEAD, ROWS, nearest, push


@triton.jit
def _move(
    gradient: tl.tensor, values: tl.tensor, H: tl.tensor, scales: tl.tensor, zeros: tl.tensor,
    groups: tl.tensor, integers: tl.tensor, errors: tl.tensor, change: tl.tensor,
    rows: tl.tensor, h_row: tl.tensor, h_column: tl.tensor, levels: tl.tensor,
    COUNT: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows through COUNT columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros([ROWS], tl.float32)
    for i in range(COUNT):
        group = tl.load(groups + i) * rows
        scale = tl.load(scales + group + row, inside, 1.0)
        zero = tl.load(zeros + group + row, inside, 0.0)
        before = tl.load(values + i * rows + row, inside, 0.0)
        g = tl.load(gradient + i * rows + row, inside, 0.0)
        pivot = tl.load(H + i * (h_row + h_column))
        q = nearest(before - tl.div_rn(g, pivot), scale, zero, levels)
        less = before - (q - zero) * scale
        tl.store(integers + i * rows + row, q.to(tl.uint8), inside)
        tl.store(errors + i * rows + row, less, inside)
        total += less * (less * (pivot * 0.5) - g)
        push(gradient, H + i * h_row, h_column, less, i, row, inside, rows, COUNT, AHEAD)
    tl.store(change + row, total, inside)


def move_by_triton(block: Block, values: Tensor) -> Tensor:
    """See ``moves.move_columns``; float32 on a GPU."""
    count, rows = block.columns.shape
    groups = torch.tensor(block.groups, dtype=torch.int32, device=values.device)
    change = torch.empty_like(values[0])
    with torch.cuda.device_of(values):
        _move[(triton.cdiv(rows, ROWS),)](
            block.columns.clone(), values, block.U, block.scales, block.zeros, groups, block.integers,
            block.errors, change, rows, *block.U.stride(), block.levels,
            COUNT=count, ROWS=ROWS, AHEAD=AHEAD, num_warps=1,
        )  # fmt: skip
    return change
