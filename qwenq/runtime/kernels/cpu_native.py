"""Multiply Int2, Int4 and Int8 weights on a CPU by C kernels, few rows as fast as memory is read.

A decode step reads every weight once. Activations are 16-bit integers by group here (at most 128 columns),
more precise than bfloat16; sums are exact, scales and totals float32. For many rows, weights are unpacked and
torch multiplies.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qwenq.compute import cpu, linear
from qwenq.runtime.kernels.cpu_grouped import CpuGrouped


class CpuNative(CpuGrouped):
    """Packed 2-, 4- or 8-bit integers; those of 2 bits lie in nibbles.

    Attributes:
        layer: the weights as C reads them.
    """

    name = "cpu-native"
    widths: ClassVar[tuple[int, ...]] = (2, 4, 8)
    group_sizes = linear.GROUP_SIZES
    many_rows = 96

    @classmethod
    def unsupported_cpu(cls) -> str | None:
        """Return why C kernels do not run here; None: they do."""
        return cpu.unsupported_reason()

    @classmethod
    def block(cls) -> int:
        """Return the outputs of a block of weights."""
        return linear.OUTPUTS

    def _stored(self, integers: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        self.layer = linear.pack(integers if bits > 2 else integers + (8 - 2), scales, max(bits, 4))
        return self.layer.weights, self.layer.scales

    def _few(self, x: Tensor) -> Tensor:
        return linear.multiply(x, self.layer)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        return linear.unpack(self.layer, dtype)
