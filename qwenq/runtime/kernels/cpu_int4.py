"""Int4 and Int8 on the CPU by torch's int4 product; by a plain bfloat16 product where there are many rows.

``_weight_int4pack_mm_for_cpu`` computes ``Σ (q - 8) · scale`` by group, in float32 with AVX-512 or AVX2, over
bfloat16 activations. Three things are brought to that form without loss:

- 8 bits: ``q - 128 = 16 · (high - 8) + (low - 8) + 8`` with the two nibbles of q. A layer of 8 bits is one
  int4 layer of twice the width, over the input twice, with scales ``16 · s`` and ``s``.
- zero points off the middle: ``Σ_g scale · (middle - zero) · Σ_i x_i``, a product with the groups' sums.
- groups longer than the op knows: a scale is said more than once.

Scales are float16 in the file and rounded to bfloat16 here, as the op wants them.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from qwenq.models.packing import PackedLinear
from qwenq.runtime.kernels.base import Grouped, Layer, Need, grouped

_GROUP_SIZES = (256, 128, 64, 32)
_BLOCKS = (64, 32)
# Rows from which unpacking to bfloat16 and one large product are faster.
_MANY_ROWS = 16
_ROWS_AT_ONCE = 4096  # of a weight that are packed in one go: bounds the int32 that the op wants


class CpuInt4:
    """Packed 2- or 4-bit integers, read as they are for each product of few rows."""

    name = "cpu-int4"
    device_type: ClassVar[str] = "cpu"
    widths: ClassVar[tuple[int, ...]] = (2, 4)

    def __init__(self, packed: PackedLinear, need: Need, bias: Tensor | None) -> None:
        self._hold(grouped(packed, need), need.bits, None if bias is None else bias.to(need.dtype))

    @classmethod
    def of(cls, layer: Grouped, bits: int) -> Self:
        """A layer without a bias that comes from elsewhere than a file."""
        self = cls.__new__(cls)
        self._hold(layer, bits, None)
        return self

    def _hold(self, layer: Grouped, bits: int, bias: Tensor | None) -> None:
        self._order, self._bias = layer.order, bias
        offsets = layer.offsets(2 ** (bits - 1))
        self._offsets = None if offsets is None else offsets.t().contiguous()  # [groups, out]
        self._size = _group_size(layer.group_size)
        scales, zero = (
            part.repeat_interleave(layer.group_size // self._size, dim=1)  # [out, groups]
            for part in self._factors(layer.scales)
        )
        pairs = torch.stack([scales, zero], dim=-1).transpose(0, 1)  # [groups, out, 2]
        self._scales = pairs.to(torch.bfloat16).contiguous()
        parts = (self._nibbles(rows, bits).int() for rows in layer.integers.split(_ROWS_AT_ONCE))
        self._weight = torch.cat(
            [torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1) for part in parts]
        )
        self._multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    @classmethod
    def why_not(cls, need: Need) -> str | None:
        """It needs a CPU with AVX2, bfloat16 activations, groups of a multiple of 32, wide enough layers."""
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if need.bits not in cls.widths:
            return f"it holds {' or '.join(map(str, cls.widths))} bits, not {need.bits}"
        if need.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(need.dtype).removeprefix('torch.')}"
        if block() == 0:
            return f"this CPU has neither AVX-512 nor AVX2 ({torch.backends.cpu.get_cpu_capability()})"
        reasons = (_why_not_layer(layer, need.group_size) for layer in need.layers)
        return next((reason for reason in reasons if reason), None)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        if x.dim() == 2:  # as a decode step has it: a small model spends as long between products as in them
            return self._rows(x.contiguous())
        return self._rows(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)

    def _rows(self, rows: Tensor) -> Tensor:
        count = rows.shape[0]
        if self._order is not None:
            rows = rows[:, self._order]
        if count < _MANY_ROWS:
            y: Tensor = self._multiply(self._widened(rows), self._weight, self._size, self._scales)
        else:
            y = self._many(rows)
        if self._offsets is not None:
            sums = rows.view(count, len(self._offsets), -1).sum(-1, dtype=torch.float32)  # [rows, groups]
            y = torch.addmm(y.float(), sums, self._offsets).to(rows.dtype)
        if self._bias is not None:
            y += self._bias
        return y

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, offsets and bias."""
        held = (self._weight, self._scales, self._offsets, self._bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _nibbles(self, integers: Tensor, bits: int) -> Tensor:
        """Uint8 [rows, in] as integers 0 … 15 around 8."""
        moved: Tensor = integers + (8 - 2 ** (bits - 1))
        return moved

    def _factors(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """What the op multiplies each integer by, and what it adds; both [out, groups] as stored."""
        return scales, torch.zeros_like(scales)

    def _widened(self, rows: Tensor) -> Tensor:
        """The input as the stored integers want it."""
        return rows

    def _many(self, rows: Tensor) -> Tensor:
        """Unpack the weight, then one product that keeps the cores busy."""
        return rows @ self._plain(integers(self._weight, self._scales.shape[1]))

    def _plain(self, integers: Tensor) -> Tensor:
        """Bfloat16 [in, out] of the stored integers [stored columns, out], scaled; overwrites them."""
        by_group = integers.view(len(self._scales), self._size, -1)  # [groups, group_size, out]
        return by_group.mul_(self._scales[:, :, 0].unsqueeze(1)).view(integers.shape)


class CpuInt8(CpuInt4):
    """Packed 8-bit integers, as two nibbles each."""

    name = "cpu-int8"
    widths: ClassVar[tuple[int, ...]] = (8,)

    def _nibbles(self, integers: Tensor, bits: int) -> Tensor:
        del bits
        return torch.cat([integers >> 4, integers & 15], dim=1)  # [rows, 2 · in]

    def _factors(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        added = torch.cat([torch.zeros_like(scales), 8 * scales], dim=1)
        return torch.cat([16 * scales, scales], dim=1), added

    def _widened(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, rows], dim=1)

    def _plain(self, integers: Tensor) -> Tensor:
        high, low = integers.chunk(2)
        # high · 16 + low + 8 is the byte less 128, which bfloat16 holds exactly: it is rounded once.
        whole = high.mul_(16).add_(low).add_(8)
        by_group = whole.view(-1, self._size, whole.shape[1])
        return by_group.mul_(self._scales[len(by_group) :, :, 0].unsqueeze(1)).view(whole.shape)


@cache
def block() -> int:
    """Outputs that the op packs side by side on this CPU: 64 with AVX-512, 32 with AVX2; 0: neither.

    Found out by packing numbers and reading them back, since torch does not tell.
    """
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return 0
    numbers = torch.arange(128 * 32, dtype=torch.int32).mul_(7).remainder_(16).view(128, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    for width in _BLOCKS:
        if torch.equal(_read_back(packed, 128, width), numbers.t().to(torch.bfloat16)):
            return width
    return 0


def integers(packed: Tensor, out_features: int) -> Tensor:
    """Bfloat16 [in, out], the packed integers less 8."""
    return _read_back(packed, out_features, block()).sub_(8)


def _read_back(packed: Tensor, out_features: int, width: int) -> Tensor:
    """Bfloat16 [in, out]: low nibbles are the first half of a block of outputs, high ones the second."""
    halves = packed.view(out_features // width, -1, width // 2).transpose(0, 1)  # [in, blocks, width / 2]
    columns, blocks, _ = halves.shape
    numbers = torch.empty(columns, blocks, 2, width // 2, dtype=torch.bfloat16)
    numbers[:, :, 0] = halves & 15
    numbers[:, :, 1] = halves >> 4
    return numbers.view(columns, out_features)


def _why_not_layer(layer: Layer, group_size: int) -> str | None:
    size = layer.in_features if group_size == -1 else group_size
    if not _group_size(size):
        return f"a group of {layer.name} has {size} columns, no multiple of {_GROUP_SIZES[-1]}"
    if not layer.even:
        return f"the groups of {layer.name} differ in size"
    if layer.out_features % block():
        return f"{layer.name} has {layer.out_features} outputs, no multiple of {block()}"
    return None


def _group_size(columns: int) -> int:
    """The longest group that the op knows and that divides so many columns; 0: none."""
    return next((size for size in _GROUP_SIZES if columns % size == 0), 0)
