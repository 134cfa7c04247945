"""Share what quantised linears on a CPU have in common: few rows by integers, many rows unpacked.

Three things that a product over groups does not know are done around it:

- columns in activation order: the input's are put into the stored order;
- zero points off the middle: ``Σ_g scale · (middle - zero) · Σ_i x_i``, a product with the groups' sums;
- groups longer than the product knows: a scale is repeated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from qwenq.compute import cpu
from qwenq.models.packing import PackedLinear
from qwenq.runtime.kernels.base import LinearShape, Requirements, UnpackedLinear, unpack_by_group


class CpuGrouped(ABC):
    """A linear layer over integers with a scale per group.

    Attributes:
        name, device_type, widths: see `QuantLinear`.
        group_sizes: columns that may share a scale in its product, longest first.
        many_rows: from here on unpacking to bfloat16 and one large product are faster.
        order: see `UnpackedLinear`.
        offsets: float32 [groups, out] of `UnpackedLinear`; None where every zero point is the middle.
        bias: [out], or None.
    """

    name: str
    device_type: ClassVar[str] = "cpu"
    widths: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]]
    many_rows: ClassVar[int]

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
        self._size = longest_group(layer.group_size, self.group_sizes)
        scales = layer.scales.repeat_interleave(layer.group_size // self._size, dim=1)  # [out, groups]
        self._weight, self._scales = self._stored(layer.integers, scales, bits)

    @classmethod
    def unsupported_reason(cls, need: Requirements) -> str | None:
        """Require the CPU's instructions, bfloat16 activations, whole groups and whole blocks of outputs."""
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if need.bits not in cls.widths:
            return f"it holds {' or '.join(map(str, cls.widths))} bits, not {need.bits}"
        if need.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(need.dtype).removeprefix('torch.')}"
        if reason := cls.unsupported_cpu():
            return reason
        reasons = (cls._unsupported_layer(layer, need.group_size) for layer in need.layers)
        return next((reason for reason in reasons if reason), None)

    @classmethod
    def _unsupported_layer(cls, layer: LinearShape, columns: int) -> str | None:
        size = layer.in_features if columns == -1 else columns
        if not longest_group(size, cls.group_sizes):
            return f"a group of {layer.name} has {size} columns, no multiple of {cls.group_sizes[-1]}"
        if not layer.even:
            return f"the groups of {layer.name} differ in size"
        if layer.out_features % cls.block():
            return f"{layer.name} has {layer.out_features} outputs, no multiple of {cls.block()}"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        if x.dim() == 2:  # as a decode step has it: a small model spends as long between products as in them
            return self._rows(x.contiguous())
        return self._rows(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)

    def _rows(self, rows: Tensor) -> Tensor:
        if self.order is not None:
            rows = rows[:, self.order]
        y = self._few(rows) if len(rows) < self.many_rows else self._many(rows)
        if self.offsets is not None:
            sums = rows.view(len(rows), len(self.offsets), -1).sum(-1, dtype=torch.float32)  # [rows, groups]
            y = torch.addmm(y.float(), sums, self.offsets).to(rows.dtype)
        if self.bias is not None:
            y += self.bias
        return y

    def _many(self, rows: Tensor) -> Tensor:
        """Multiply by one large product, in float32 where this CPU multiplies that faster."""
        wide = cpu.float32_is_faster()
        weight = self._unpacked(torch.float32 if wide else rows.dtype)
        return (rows.float() @ weight).to(rows.dtype) if wide else rows @ weight

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, offsets and bias."""
        held = (self._weight, self._scales, self.offsets, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @classmethod
    @abstractmethod
    def unsupported_cpu(cls) -> str | None:
        """Return why this CPU cannot run any such layer; None: it can."""

    @classmethod
    @abstractmethod
    def block(cls) -> int:
        """Return how many outputs are packed side by side."""

    @abstractmethod
    def _stored(self, integers: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Arrange uint8 [out, in] and float32 [out, groups] as the product reads them."""

    @abstractmethod
    def _few(self, x: Tensor) -> Tensor:
        """Multiply bfloat16 [rows, in] by the integers as they lie, without offsets and bias."""

    @abstractmethod
    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [in, out]: for many rows one product with it keeps the cores busy."""


def longest_group(columns: int, sizes: tuple[int, ...]) -> int:
    """Return the longest of some group sizes that divides so many columns; 0: there is none."""
    return next((size for size in sizes if columns % size == 0), 0)
