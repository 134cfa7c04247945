"""Int4 and Int8 on CPUs with AVX-512 VNNI: integer products for few rows, read as fast as memory gives.

A decode step reads every weight once, and torch's int4 product is too busy unpacking to keep up with memory.
Activations are 16-bit integers by group here (at most 128 columns), more precise than the bfloat16 that they
come in; sums are exact, scales and totals float32. For many rows, weights are unpacked to bfloat16 and torch
multiplies, as in ``cpu_int4``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from qwenq.native import support
from qwenq.runtime.kernels.cpu_grouped import CpuGrouped
from qwenq.runtime.kernels.native_layout import OUTPUTS, activation_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_AT_ONCE = 4  # rows whose sums fit into registers
_LINE = 64  # bytes: no register of weights lies across two lines of the cache


class CpuVnni(CpuGrouped):
    """Packed 2-, 4- or 8-bit integers; those of 2 bits lie in nibbles.

    Attributes:
        bits: as stored, 4 or 8.
        told: ``native_layout.LAYER``.
    """

    name = "cpu-vnni"
    widths: ClassVar[tuple[int, ...]] = (2, 4, 8)
    group_sizes = (128, 64, 32)
    many_rows = 96

    @classmethod
    def unable(cls) -> str | None:
        """It needs AVX-512 VNNI and the means to compile for it."""
        return support.why_not("avx512f", "avx512bw", "avx512vl", "avx512vnni")

    @classmethod
    def block(cls) -> int:
        """Two registers of 32-bit sums."""
        return OUTPUTS

    def _stored(self, integers: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        self.bits, (self._out, self._columns) = max(bits, 4), integers.shape
        weight = _aligned(_registers(integers if bits > 2 else integers + (8 - 2), self.bits))
        exact = bool((scales.half().float() == scales).all())
        blocks = scales.view(self._out // OUTPUTS, OUTPUTS, -1).transpose(1, 2)  # [blocks, groups, 32]
        factors = _aligned(blocks.to(torch.float16 if exact else torch.float32).contiguous())
        self.told = (
            weight.data_ptr(), factors.data_ptr(), self._columns, self._out // OUTPUTS, self._size,
        )  # fmt: skip
        self._layer = (ctypes.c_int64 * len(self.told))(*self.told)
        return weight, factors

    @property
    def scale_type(self) -> str:
        """Of the weights' scales: ``float16``, or ``float32`` where that would round them."""
        return str(self._scales.dtype).removeprefix("torch.")

    def _few(self, x: Tensor) -> Tensor:
        count = len(x)
        chunk = at_once(count)
        chunks = -(-count // chunk)
        whole = chunks * chunk  # rows are filled up
        if whole != count:
            x = torch.cat([x, x.new_zeros(whole - count, x.shape[1])])
        y = torch.empty(whole, self._out, dtype=torch.bfloat16)
        space = torch.empty(activation_bytes(whole, self._columns, self._size), dtype=torch.uint8)
        product = _code("product", self.bits, chunk, self.scale_type)
        product(
            ctypes.addressof(self._layer),
            x.data_ptr(),
            y.data_ptr(),
            space.data_ptr(),
            chunks,
            torch.get_num_threads(),
        )
        return y if whole == count else y[:count]

    def _unpacked(self) -> Tensor:
        weight = torch.empty(self._columns, self._out, dtype=torch.bfloat16)
        unpack = _code("unpacked", self.bits, self.scale_type)
        unpack(ctypes.addressof(self._layer), weight.data_ptr(), torch.get_num_threads())
        return weight


@cache
def _code(name: str, *arguments: object) -> Callable[..., None]:
    """A function of ``native_vnni``, compiled once for all layers."""
    from qwenq.runtime.kernels import native_vnni

    made: Callable[..., None] = getattr(native_vnni, name)(*arguments)
    return made


def at_once(rows: int) -> int:
    """Rows of a chunk: 1, 2 or 4."""
    return min(rows, 2) if rows < 3 else _AT_ONCE


def _registers(integers: Tensor, bits: int) -> Tensor:
    """Uint8 [out, in] as native_vnni reads it: [blocks, steps, registers, 64 bytes]."""
    out, columns = integers.shape
    fours = 8 // bits  # quadruples of columns in a register
    # [blocks, registers, 16 outputs, steps, fours, 4 columns]
    parts = integers.view(out // OUTPUTS, OUTPUTS // 16, 16, columns // (4 * fours), fours, 4)
    parts = parts.permute(0, 3, 4, 1, 2, 5).flatten(-2)  # [blocks, steps, fours, registers, 64]
    if bits == 8:
        return parts[:, :, 0].contiguous()
    return (parts[:, :, 0] | (parts[:, :, 1] << 4)).contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """The same numbers at the start of a cache line."""
    room = torch.empty(tensor.nbytes + _LINE, dtype=torch.uint8)
    start = -room.data_ptr() % _LINE
    moved = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)
