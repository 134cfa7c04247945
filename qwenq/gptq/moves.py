"""The columns of one block of coordinate descent: each integer moved to the best value given all others.

By torch, by compiled code on a CPU, or by one kernel on a GPU. The first two find the same integers bit for
bit. A block is what rounding takes, see ``columns``, with H in place of U and gradients in place of weights:

    columns: [block, rows], the columns of G = (Q − W) H.
    U:       [block, block] of H: symmetric.
    errors:  filled with the old values less the new ones, which is what other gradients still have to lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.gptq.columns import Block, native_why_not, triton_why_not


def move_columns(block: Block, values: Tensor) -> Tensor:
    """Fill integers and errors; returns by how much that changes ``output_error``, [rows].

    Args:
        block: as above.
        values: [block, rows] of the same dtype, contiguous: the columns of Q.
    """
    if triton_why_not(block.columns) is None:
        from qwenq.gptq.triton_moves import move_by_triton

        return move_by_triton(block, values)
    if native_why_not(block.columns) is None:
        from qwenq.gptq.native_moves import move_natively

        return move_natively(block, values)
    return move_by_torch(block, values)


def move_by_torch(block: Block, values: Tensor) -> Tensor:
    """See ``move_columns``: any device, float32 or float64."""
    gradient, H, groups = block.columns.clone(), block.U, block.groups
    pivots = H.diagonal().tolist()
    views = zip(gradient.unbind(), values.unbind(), block.errors.unbind(), H.unbind(), strict=True)
    for i, (g, value, less, h) in enumerate(views):
        scale, zero = block.scales[groups[i]], block.zeros[groups[i]]
        wanted = torch.sub(value, torch.div(g, pivots[i]))  # q_i − G_i / H_ii
        z = wanted.div_(scale).add_(zero).round_().clamp_(0, block.levels)
        block.integers[i] = z
        torch.sub(value, z.sub_(zero).mul_(scale), out=less)
        if i + 1 < len(gradient):
            gradient[i + 1 :].sub_(torch.outer(h[i + 1 :], less))
    # These gradients have kept the values that the moves were made from.
    halves = H.diagonal()[:, None] / 2
    return (block.errors * (block.errors * halves - gradient)).sum(0)
