"""Int4 and Int8 on CPUs with AVX-512 VNNI: integer products for few rows, read as fast as memory gives.

A decode step reads every weight once, and torch's int4 product is too busy unpacking to keep up with memory.
Activations are 16-bit integers by group here (at most 128 columns), more precise than the bfloat16 that they
come in; sums are exact, scales and totals float32. For many rows, weights are unpacked to bfloat16 and torch
multiplies, as in ``cpu_int4``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from qwenq.models.packing import PackedLinear
from qwenq.runtime.kernels import native_support
from qwenq.runtime.kernels.base import Grouped, Layer, Need, grouped

if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 32  # outputs side by side, see native_vnni
_GROUP_SIZES = (128, 64, 32)
_AT_ONCE = 4  # rows whose sums fit into registers
MANY_ROWS = 96
"""From here on unpacking to bfloat16 and one large product are faster."""

_LINE = 64  # bytes: no register of weights lies across two lines of the cache


class CpuVnni:
    """Packed 2-, 4- or 8-bit integers; those of 2 bits lie in nibbles.

    Attributes:
        bits: as stored, 4 or 8.
        order, bias, offsets: see `Grouped`; None where there are none.
        told: ``native_vnni.LAYER``.
    """

    name = "cpu-vnni"
    device_type: ClassVar[str] = "cpu"
    widths: ClassVar[tuple[int, ...]] = (2, 4, 8)

    def __init__(self, packed: PackedLinear, need: Need, bias: Tensor | None) -> None:
        self._hold(grouped(packed, need), need.bits, None if bias is None else bias.to(need.dtype))

    @classmethod
    def of(cls, layer: Grouped, bits: int) -> Self:
        """A layer without a bias that comes from elsewhere than a file."""
        self = cls.__new__(cls)
        self._hold(layer, bits, None)
        return self

    def _hold(self, layer: Grouped, bits: int, bias: Tensor | None) -> None:
        self.order, self.bias = layer.order, bias
        offsets = layer.offsets(2 ** (bits - 1))
        self.offsets = None if offsets is None else offsets.t().contiguous()  # [groups, out]
        self.bits, (self._out, self._columns) = max(bits, 4), layer.integers.shape
        integers = layer.integers if bits > 2 else layer.integers + (8 - 2)
        self._weight = _aligned(_registers(integers, self.bits))
        self._size = group_size(layer.group_size)
        scales = layer.scales.repeat_interleave(layer.group_size // self._size, dim=1)  # [out, groups]
        exact = bool((scales.half().float() == scales).all())
        blocks = scales.view(self._out // _BLOCK, _BLOCK, -1).transpose(1, 2)  # [blocks, groups, 32]
        self._scales = _aligned(blocks.to(torch.float16 if exact else torch.float32).contiguous())
        self.told = (
            self._weight.data_ptr(), self._scales.data_ptr(),
            self._columns, self._out // _BLOCK, self._size,
        )  # fmt: skip
        self._groups = self._columns // self._size
        self._layer = (ctypes.c_int64 * len(self.told))(*self.told)

    @classmethod
    def why_not(cls, need: Need) -> str | None:
        """It needs AVX-512 VNNI, bfloat16 activations, groups of a multiple of 32, outputs of 32."""
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if need.bits not in cls.widths:
            return f"it holds 2, 4 or 8 bits, not {need.bits}"
        if need.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(need.dtype).removeprefix('torch.')}"
        if reason := unable():
            return reason
        reasons = (_why_not_layer(layer, need.group_size) for layer in need.layers)
        return next((reason for reason in reasons if reason), None)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        if x.dim() == 2:  # as a decode step has it: a small model spends as long between products as in them
            return self._rows(x.contiguous())
        return self._rows(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)

    @property
    def scale_type(self) -> str:
        """Of the weights' scales: ``float16``, or ``float32`` where that would round them."""
        return str(self._scales.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, offsets and bias."""
        held = (self._weight, self._scales, self.offsets, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def _rows(self, rows: Tensor) -> Tensor:
        if self.order is not None:
            rows = rows[:, self.order]
        y = self._few(rows) if len(rows) < MANY_ROWS else self._many(rows)
        if self.offsets is not None:
            sums = rows.view(len(rows), len(self.offsets), -1).sum(-1, dtype=torch.float32)  # [rows, groups]
            y = torch.addmm(y.float(), sums, self.offsets).to(rows.dtype)
        if self.bias is not None:
            y += self.bias
        return y

    def _few(self, x: Tensor) -> Tensor:
        """Bfloat16 [rows, in] → [rows, out]; rows are filled up to whole chunks."""
        count = len(x)
        chunk = at_once(count)
        chunks = -(-count // chunk)
        whole = chunks * chunk
        if whole != count:
            x = torch.cat([x, x.new_zeros(whole - count, x.shape[1])])
        y = torch.empty(whole, self._out, dtype=torch.bfloat16)
        space = torch.empty(2 * whole * (self._columns + 4 * self._groups), dtype=torch.uint8)
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

    def _many(self, x: Tensor) -> Tensor:
        """Unpack the weight, then one product that keeps the cores busy."""
        weight = torch.empty(self._columns, self._out, dtype=torch.bfloat16)
        unpack = _code("unpacked", self.bits, self.scale_type)
        unpack(ctypes.addressof(self._layer), weight.data_ptr(), torch.get_num_threads())
        return x @ weight


@cache
def _code(name: str, *arguments: object) -> Callable[..., None]:
    """A function of ``native_vnni``, compiled once for all layers."""
    from qwenq.runtime.kernels import native_vnni

    made: Callable[..., None] = getattr(native_vnni, name)(*arguments)
    return made


def at_once(rows: int) -> int:
    """Rows of a chunk: 1, 2 or 4."""
    return min(rows, 2) if rows < 3 else _AT_ONCE


def unable() -> str | None:
    """Why no layer can be run so on this machine; None: it can."""
    return native_support.why_not("avx512f", "avx512bw", "avx512vl", "avx512vnni")


def group_size(columns: int) -> int:
    """The longest group of activations that divides so many columns; 0: none."""
    return next((size for size in _GROUP_SIZES if columns % size == 0), 0)


def _why_not_layer(layer: Layer, columns: int) -> str | None:
    size = layer.in_features if columns == -1 else columns
    if not group_size(size):
        return f"a group of {layer.name} has {size} columns, no multiple of {_GROUP_SIZES[-1]}"
    if not layer.even:
        return f"the groups of {layer.name} differ in size"
    if layer.out_features % _BLOCK:
        return f"{layer.name} has {layer.out_features} outputs, no multiple of {_BLOCK}"
    return None


def _registers(integers: Tensor, bits: int) -> Tensor:
    """Uint8 [out, in] as native_vnni reads it: [blocks, steps, registers, 64 bytes]."""
    out, columns = integers.shape
    fours = 8 // bits  # quadruples of columns in a register
    # [blocks, registers, 16 outputs, steps, fours, 4 columns]
    parts = integers.view(out // _BLOCK, _BLOCK // 16, 16, columns // (4 * fours), fours, 4)
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
