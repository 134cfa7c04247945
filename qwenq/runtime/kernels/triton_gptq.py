"""Multiply Int4 and Int8 weights on an NVIDIA GPU by three Triton kernels, chosen by the number of rows.

The packed words of the file are read as they are: a word holds consecutive inputs of one output, its
neighbours the same inputs of the next outputs, so four words in a row are one 16-byte load. Zero points
are unpacked once, at load: packed along the outputs, each word of them would be read by the threads of
eight of those. Where all of them are the middle, as in a symmetric model, they are a constant.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qwenq.compute import gpu
from qwenq.models.packing import PackedLinear, has_trivial_g_idx, pack, unpack_zeros
from qwenq.runtime.kernels.base import Requirements, unpack_by_group

SOME_ROWS = 16
"""Up to so many rows, tensor cores over words unpacked on the way; above, the weight is unpacked whole."""


class TritonInt4:
    """4-bit integers; float32 sums; the same input gives the same bits."""

    name = "triton-int4"
    device_type: ClassVar[str] = "cuda"
    widths: ClassVar[tuple[int, ...]] = (4,)

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        self._bits, self._dtype = need.bits, need.dtype
        self._order: Tensor | None = None
        words, zeros = packed.qweight, unpack_zeros(packed.qzeros, need.bits, need.checkpoint_format)
        if not has_trivial_g_idx(packed.g_idx, packed.groups):
            # Columns in activation order are sorted by group and packed anew, and the input is put in that
            # order.
            layer = unpack_by_group(packed, need)
            words = pack(layer.integers, layer.scales, layer.zeros, need.bits, "gptq_v2").qweight
            self._order = None if layer.order is None else layer.order.to(need.device)
        self._words = words.to(need.device).contiguous()  # int32 [in · bits / 32, out]
        self._scales = packed.scales.to(need.device).contiguous()  # [groups, out]
        middle = 2 ** (need.bits - 1)
        self._zeros = None  # uint8 [groups, out]
        if bool((zeros != middle).any()):
            self._zeros = zeros.t().to(need.device).contiguous()
        self._bias = None if bias is None else bias.to(need.device, need.dtype)

    @classmethod
    def unsupported_reason(cls, need: Requirements) -> str | None:
        """Require a GPU with Triton, 16-bit activations, and groups of whole words."""
        if need.bits not in cls.widths:
            return f"it holds {cls.widths[0]} bits, not {need.bits}"
        if reason := gpu.unsupported_reason(need.device):
            return reason
        if need.dtype not in (torch.bfloat16, torch.float16):
            return f"it multiplies bfloat16 or float16, not {str(need.dtype).removeprefix('torch.')}"
        for layer in need.layers:
            size = layer.in_features if need.group_size == -1 else need.group_size
            if size % 32:
                return f"a group has {size} columns, which is no multiple of 32 ({layer.name})"
            if not layer.even:
                return f"the groups of {layer.name} differ in size"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        from qwenq.runtime.kernels.triton_gptq_dot import multiply_rows
        from qwenq.runtime.kernels.triton_gptq_gemv import multiply_row
        from qwenq.runtime.kernels.triton_gptq_unpack import unpack_weight

        rows = x.reshape(-1, x.shape[-1])
        if self._order is not None:
            rows = rows[:, self._order]
        weight = (self._words, self._scales, self._zeros, self._bits)
        if len(rows) == 1:
            return multiply_row(rows, *weight, self._bias).view(*x.shape[:-1], -1)
        few = len(rows) <= SOME_ROWS
        y = multiply_rows(rows, *weight) if few else rows @ unpack_weight(*weight, x.dtype)
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, zero points and bias."""
        held = (self._words, self._scales, self._zeros, self._bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class TritonInt8(TritonInt4):
    """8-bit integers."""

    name = "triton-int8"
    widths: ClassVar[tuple[int, ...]] = (8,)
