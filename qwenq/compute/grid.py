"""Define the grid that a weight is rounded to, value = scale · (integer − zero), and choose it.

Scales start at min/max. The search minimises Σ_j h_j |w_j − q_j|^p over scale candidates, then refines the
best in closed form. With h = diag(H) and p = 2 this is the diagonal part of GPTQ's own objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qwenq.compute.columns import storable
from qwenq.compute.scales import Groups, search_scales


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight matrix.

    A symmetric grid has its zero point in the middle (8 of 0…15). Its scale may be negative: the side with
    2^(bits−1) steps then lies on the positive half, which fits a group whose largest weight is positive.
    """

    bits: int  # 2…8; files hold 4 or 8
    group_size: int  # input columns per scale
    scales: Tensor  # [rows, groups] float32, each exactly representable in float16, never zero
    zeros: Tensor  # [rows, groups] float32 holding integers in 0 … 2^bits − 1

    @property
    def levels(self) -> int:
        """Return the largest integer, 2^bits − 1."""
        return (1 << self.bits) - 1

    def integers(self, weight: Tensor) -> Tensor:
        """Round to nearest: [rows, in] float → [rows, in] float holding integers."""
        rows, width = weight.shape
        grouped = weight.reshape(rows, -1, self.group_size)  # [rows, groups, group_size]
        scaled = grouped / self.scales[..., None] + self.zeros[..., None]
        return scaled.round_().clamp_(0, self.levels).reshape(rows, width)

    def values(self, integers: Tensor) -> Tensor:
        """Dequantise: [rows, in] integers of any dtype → [rows, in] float32."""
        rows, width = integers.shape
        grouped = integers.reshape(rows, -1, self.group_size).float()  # [rows, groups, group_size]
        return ((grouped - self.zeros[..., None]) * self.scales[..., None]).reshape(rows, width)


class Rounded(NamedTuple):
    """Integers of a weight matrix, and what they cost."""

    integers: Tensor  # [rows, in] uint8, natural column order
    errors: Tensor  # [rows], each row's ``solver.output_error``


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


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    sym: bool,
    search: ScaleSearch = "none",
    importance: Tensor | None = None,
) -> Tensor:
    """Return a weight rounded to the nearest values of its grid, float32 [rows, in].

    Arguments are those of ``search_grid``, except that a group size of -1 is a group for each row, and that
    without a search the last group may be short.
    """
    width = weight.shape[1]
    size = width if group_size == -1 else group_size
    padded = functional.pad(weight, (0, -width % size))
    importance = padded.new_ones(padded.shape[1]) if importance is None else importance
    grid = search_grid(padded, importance, bits, size, sym=sym, search=search)
    return grid.values(grid.integers(padded))[:, :width]


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
