"""Choose the grid of a weight before rounding."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qwenq.compute.columns import storable
from qwenq.compute.scales import Groups, search_scales
from qwenq.gptq.grid import Grid

ScaleSearch = Literal["hessian", "mse", "none"]


def search_grid(
    weight: Tensor, importance: Tensor, bits: int, group_size: int, *, sym: bool, search: ScaleSearch
) -> Grid:
    """Choose scales and zero points for a weight matrix.

    Args:
        weight: [rows, in] float32.
        importance: [in] float32, diag(H); only "hessian" reads it.
        bits: 2…8.
        group_size: divides ``in``.
        sym: whether the zero point is fixed in the middle.
        search: "hessian" (weighted squared error), "mse" (unweighted, power 2.4) or "none" (min/max).
    """
    rows, width = weight.shape
    grouped = weight.reshape(-1, group_size)  # [rows · groups, group_size]
    scales, zeros = _symmetric_range(grouped, bits) if sym else _asymmetric_range(grouped, bits)
    if search != "none":
        search_scales(Groups(grouped, importance, scales, zeros, bits, sym, weighted=search == "hessian"))
    shape = (rows, width // group_size)
    return Grid(bits, group_size, storable(scales.reshape(shape)), zeros.reshape(shape))


def _symmetric_range(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zeros by min/max, [groups] each, with the zero point in the middle.

    The largest weight is put on the grid's longer, negative side: its scale is negative if it is positive.
    """
    high, low = grouped.amax(1), grouped.amin(1)
    half = 1 << (bits - 1)
    scales = torch.where(high > -low, -high, -low) / half
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, torch.full_like(scales, float(half))


def _asymmetric_range(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zeros by min/max, [groups] each, with 0 on the grid."""
    high, low = grouped.amax(1).clamp_(min=0), grouped.amin(1).clamp_(max=0)
    levels = (1 << bits) - 1
    # The zero point is at least 1 (0 has no safe form in the v1 layout): one step is lost to weights above 0.
    scales = torch.maximum((high - low) / levels, high / (levels - 1))
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, (-low / scales).round_().clamp_(1, levels)
