"""One group's scale, chosen anew for the integers that it has: in closed form, all other groups held fixed.

With u = Z − z the group's integers around its zero point, G the gradient and H the group's own block, the
objective is a parabola in the scale: it changes by δ · uᵀG + δ²/2 · uᵀHu, least at δ = −uᵀG / uᵀHu (the
second stage of arXiv 2602.02126, a group at a time).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.gptq.columns import Block, native_why_not
from qwenq.gptq.grid import storable

WIDEST = 256
"""Columns of a group for compiled code; a wider one is a matrix product that the library is faster at."""


def refit_scale(block: Block, group: int) -> Tensor:
    """Change the group's scales; returns by how much that changes ``output_error``, [rows].

    A scale is rounded to float16, as it is stored; a row that this leaves no better off keeps its own.

    Args:
        block: a whole group as ``moves.move_columns`` has left it, with the gradients as they were before.
        group: its number among ``block.scales``.
    """
    slope, curve = _parabola(block, group)
    scale = block.scales[group]
    wanted = scale - slope / curve
    refitted = torch.where(wanted.isfinite() & (wanted != 0), storable(wanted), scale)
    step = refitted - scale
    change = step * (slope + step * (curve / 2))
    better = change < 0
    scale.copy_(torch.where(better, refitted, scale))
    return torch.where(better, change, 0.0)


def _parabola(block: Block, group: int) -> tuple[Tensor, Tensor]:
    """uᵀG and uᵀHu, [rows] each, by torch or by compiled code: these sum in different orders."""
    if len(block.columns) <= WIDEST and native_why_not(block.columns) is None:
        from qwenq.gptq.native_refit import parabola_natively

        return parabola_natively(block, group)
    return parabola_by_torch(block, group)


def parabola_by_torch(block: Block, group: int) -> tuple[Tensor, Tensor]:
    """Any device, float32 or float64."""
    u = block.integers.to(block.columns.dtype) - block.zeros[group]
    Hu = block.U @ u  # [group_size, rows]
    return (u * block.columns - block.errors * Hu).sum(0), (u * Hu).sum(0)  # the moves' part: H is symmetric
