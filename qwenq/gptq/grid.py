"""Define the grid that a weight is rounded to: value = scale · (integer − zero), per row and group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scales and zero points of a weight matrix.

    A symmetric grid has its zero point in the middle (8 of 0…15). Its scale may be negative: the side with
    2^(bits−1) steps then lies on the positive half, which fits a group whose largest weight is positive.

    Attributes:
        bits: 2…8; files hold 4 or 8.
        group_size: input columns per scale.
        scales: [rows, groups] float32, each exactly representable in float16, never zero.
        zeros: [rows, groups] float32 holding integers in 0 … 2^bits − 1.
    """

    bits: int
    group_size: int
    scales: Tensor
    zeros: Tensor

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
    """Integers of a weight matrix, and what they cost.

    Attributes:
        integers: [rows, in] uint8, natural column order.
        errors: [rows], each row's ``solver.output_error``.
    """

    integers: Tensor
    errors: Tensor
