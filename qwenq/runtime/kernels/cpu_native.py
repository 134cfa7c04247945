"""Multiply Int2, Int4 and Int8 weights on a CPU by C kernels, few rows as fast as memory is read.

A decode step reads every weight once. Activations are 16-bit integers by group here (at most 128
columns), more precise than bfloat16; sums are exact, scales and totals float32. For many rows, weights
are unpacked and torch multiplies. Three things that the product over groups does not know are done
around it:

- columns in activation order: the input's are put into the stored order;
- zero points off the middle: ``Σ_g scale · (middle - zero) · Σ_i x_i``, a product with the groups'
  sums;
- groups longer than the product knows: a scale is repeated.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from qwenq.compute import cpu, linear
from qwenq.models.packing import PackedLinear
from qwenq.runtime.kernels.base import LinearShape, Requirements, UnpackedLinear, unpack_by_group


class CpuNative:
    """Packed 2-, 4- or 8-bit integers; those of 2 bits lie in nibbles.

    Attributes:
        many_rows: from here on unpacking and one large product are faster.
        order: see `UnpackedLinear`.
        offsets: float32 [groups, out] of `UnpackedLinear`; None where every zero point is the middle.
        bias: [out], or None.
        layer: the weights as C reads them.
    """

    name = "cpu-native"
    device_type: ClassVar[str] = "cpu"
    widths: ClassVar[tuple[int, ...]] = (2, 4, 8)
    many_rows: ClassVar[int] = 96

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        layer = unpack_by_group(packed, need)
        self._take(layer, need.bits, None if bias is None else bias.to(need.dtype))

    @classmethod
    def of(cls, layer: UnpackedLinear, bits: int) -> Self:
        """Return a layer without a bias that comes from elsewhere than a file."""
        self = cls.__new__(cls)
        self._take(layer, bits, None)
        return self

    def _take(self, layer: UnpackedLinear, bits: int, bias: Tensor | None) -> None:
        self.order, self.bias = layer.order, bias
        offsets = layer.offsets(2 ** (bits - 1))
        self.offsets = None if offsets is None else offsets.t().contiguous()  # [groups, out]
        scales = layer.scales.repeat_interleave(layer.group_size // _longest_group(layer.group_size), dim=1)
        integers = layer.integers if bits > 2 else layer.integers + (8 - 2)
        self.layer = linear.pack(integers, scales, max(bits, 4))

    @classmethod
    def unsupported_reason(cls, need: Requirements) -> str | None:
        """Require the C library, bfloat16 activations, whole groups and whole blocks of outputs."""
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if need.bits not in cls.widths:
            return f"it holds {' or '.join(map(str, cls.widths))} bits, not {need.bits}"
        if need.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(need.dtype).removeprefix('torch.')}"
        if reason := cpu.unsupported_reason():
            return reason
        reasons = (_unsupported_layer(layer, need.group_size) for layer in need.layers)
        return next((reason for reason in reasons if reason), None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        if x.dim() == 2:  # as a decode step has it: a small model spends as long between products as in them
            return self._rows(x.contiguous())
        return self._rows(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)

    def _rows(self, rows: Tensor) -> Tensor:
        if self.order is not None:
            rows = rows[:, self.order]
        y = linear.multiply(rows, self.layer) if len(rows) < self.many_rows else self._many(rows)
        if self.offsets is not None:
            sums = rows.view(len(rows), len(self.offsets), -1).sum(-1, dtype=torch.float32)  # [rows, groups]
            y = torch.addmm(y.float(), sums, self.offsets).to(rows.dtype)
        if self.bias is not None:
            y += self.bias
        return y

    def _many(self, rows: Tensor) -> Tensor:
        """Multiply by one large product, in float32 where this CPU multiplies that faster."""
        wide = cpu.float32_is_faster()
        weight = linear.unpack(self.layer, torch.float32 if wide else rows.dtype)  # [in, out]
        return (rows.float() @ weight).to(rows.dtype) if wide else rows @ weight

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, offsets and bias."""
        held = (self.layer.weights, self.layer.scales, self.offsets, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _unsupported_layer(layer: LinearShape, columns: int) -> str | None:
    size = layer.in_features if columns == -1 else columns
    if not _longest_group(size):
        return f"a group of {layer.name} has {size} columns, no multiple of {linear.GROUP_SIZES[-1]}"
    if not layer.even:
        return f"the groups of {layer.name} differ in size"
    if layer.out_features % linear.OUTPUTS:
        return f"{layer.name} has {layer.out_features} outputs, no multiple of {linear.OUTPUTS}"
    return None


def _longest_group(columns: int) -> int:
    """Return the longest group of the C kernel that divides so many columns; 0: there is none."""
    return next((size for size in linear.GROUP_SIZES if columns % size == 0), 0)
