"""Multiply Int4 and Int8 weights on a CPU by torch's int4 product, many rows by a plain bfloat16 one.

``_weight_int4pack_mm_for_cpu`` computes ``Σ (q - 8) · scale`` by group, in float32 with AVX-512 or AVX2, over
bfloat16 activations. 8 bits are brought to that form without loss:
``q - 128 = 16 · (high - 8) + (low - 8) + 8`` with the two nibbles of q. A layer of 8 bits is one int4 layer
of twice the width, over the input twice, with scales ``16 · s`` and ``s``.

Scales are float16 in the file and rounded to bfloat16 here, as the op takes them.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from qwenq.runtime.kernels.cpu_grouped import CpuGrouped

_BLOCKS = (64, 32)
_ROWS_AT_ONCE = 4096  # of a weight that are packed in one go: bounds the int32 that the op takes


class CpuInt4(CpuGrouped):
    """Packed 2- or 4-bit integers, read as they are for each product of few rows."""

    name = "cpu-int4"
    widths: ClassVar[tuple[int, ...]] = (2, 4)
    group_sizes = (256, 128, 64, 32)
    many_rows = 16

    @classmethod
    def unsupported_cpu(cls) -> str | None:
        """Require AVX-512 or AVX2."""
        if block() == 0:
            return f"this CPU has neither AVX-512 nor AVX2 ({torch.backends.cpu.get_cpu_capability()})"
        return None

    @classmethod
    def block(cls) -> int:
        """Return how many torch packs side by side on this CPU."""
        return block()

    def _stored(self, integers: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        pairs = torch.stack(self._factors(scales), dim=-1).transpose(0, 1)  # [groups, out, 2]
        parts = (self._nibbles(rows, bits).int() for rows in integers.split(_ROWS_AT_ONCE))
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return torch.cat([pack(part, 1) for part in parts]), pairs.to(torch.bfloat16).contiguous()

    def _few(self, x: Tensor) -> Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        y: Tensor = multiply(self._widened(x), self._weight, self._size, self._scales)
        return y

    def _nibbles(self, integers: Tensor, bits: int) -> Tensor:
        """Return uint8 [rows, in] as integers 0 … 15 around 8."""
        moved: Tensor = integers + (8 - 2 ** (bits - 1))
        return moved

    def _factors(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the op multiplies each integer by, and what it adds; both [out, groups] as stored."""
        return scales, torch.zeros_like(scales)

    def _widened(self, rows: Tensor) -> Tensor:
        """Return the input for the stored integers."""
        return rows

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        return self._plain(integers(self._weight, self._scales.shape[1])).to(dtype)

    def _plain(self, integers: Tensor) -> Tensor:
        """Scale the stored integers [stored columns, out] in place, to bfloat16 [in, out]."""
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
    """Return how many outputs the op packs side by side: 64 with AVX-512, 32 with AVX2; 0: neither.

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
    """Return the packed integers less 8, bfloat16 [in, out]."""
    return _read_back(packed, out_features, block()).sub_(8)


def _read_back(packed: Tensor, out_features: int, width: int) -> Tensor:
    """Return the packed integers, bfloat16 [in, out].

    Low nibbles are the first half of a block of outputs, high ones the second.
    """
    halves = packed.view(out_features // width, -1, width // 2).transpose(0, 1)  # [in, blocks, width / 2]
    columns, blocks, _ = halves.shape
    numbers = torch.empty(columns, blocks, 2, width // 2, dtype=torch.bfloat16)
    numbers[:, :, 0] = halves & 15
    numbers[:, :, 1] = halves >> 4
    return numbers.view(columns, out_features)
