"""One group's scale, chosen anew for the integers that it has: in closed form, all other groups held fixed.

With u = Z − z the group's integers around its zero point, G the gradient and H the group's own block, the
objective is a parabola in the scale: it changes by δ · uᵀG + δ²/2 · uᵀHu, least at δ = −uᵀG / uᵀHu (the
second stage of arXiv 2602.02126, a group at a time).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwenq.gptq.columns import Block, native_why_not
from qwenq.gptq.grid import storable

WIDEST = 256
"""Columns of a group for compiled code; a wider one is a matrix product that the library is faster at."""


class Fitted(NamedTuple):
    """A group after its scale was fitted.

    Attributes:
        scale: [rows].
        values: [group_size, rows] of the integers with it.
        less: [group_size, rows] the values before, less these.
        change: [rows] of ``output_error``, by the scale alone.
    """

    scale: Tensor
    values: Tensor
    less: Tensor
    change: Tensor


def fit_scale(block: Block, values: Tensor, group: int) -> Fitted:
    """The group with a better scale, as it is stored: rounded to float16; else with its own.

    By torch or by compiled code, which sum in different orders.

    Args:
        block: a whole group as ``moves.move_columns`` has left it, with the gradients as they were before.
        values: [group_size, rows] before that, as it was told.
        group: its number among ``block.scales``.
    """
    if len(block.columns) <= WIDEST and native_why_not(block.columns) is None:
        from qwenq.gptq.native_refit import fit_natively

        return fit_natively(block, values, group)
    return fit_by_torch(block, values, group)


def fit_by_torch(block: Block, values: Tensor, group: int) -> Fitted:
    """See ``fit_scale``: any device, float32 or float64."""
    old = block.scales[group]
    u = block.integers.to(old.dtype) - block.zeros[group]
    Hu = block.U @ u  # [group_size, rows]
    slope = (u * block.columns - block.errors * Hu).sum(
        0
    )  # the moves changed G by −H · errors, H is symmetric
    curve = (u * Hu).sum(0)
    wanted = old - slope / curve
    stored = torch.where(wanted.isfinite() & (wanted != 0), storable(wanted), old)
    step = stored - old
    change = step * (slope + step * (curve / 2))
    better = change < 0
    scale = torch.where(better, stored, old)
    now = u.mul_(scale)
    return Fitted(scale, now, values - now, torch.where(better, change, 0.0))
