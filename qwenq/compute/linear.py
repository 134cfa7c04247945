"""Multiply few rows by weights as they lie in memory: 4 and 8 bits scaled by group, or plain numbers.

A decode step reads every weight once, at the memory's speed (``csrc/linear.c``, ``csrc/dense.c``). The
reference is one product of plain numbers, of what ``unpack`` gives; it is also what is faster for many rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwenq.compute import cpu
from qwenq.compute.cpu import DTYPE_CODES

OUTPUTS = 32  # outputs of a block of weights; a layer has whole blocks
GROUP_SIZES = (128, 64, 32)  # columns that may share a scale, the longest first
LINEAR_FIELDS = ("weights", "scales", "columns", "outputs", "group_size", "bits", "scales_float16")
"""What C reads of a layer, int64 each."""
_LINE = 64  # bytes: a step of weights begins at a cache line


@dataclass(frozen=True)
class PackedWeights:
    """A layer's weights in the layout of ``csrc/linear.c``."""

    # uint8 [blocks, steps, 32 outputs, 4 columns]; with 4 bits the columns 4 … 7 of a step lie in the high
    # nibbles. Plain numbers: bfloat16 or float32 [outputs, columns].
    weights: Tensor
    # [blocks, groups, 32] float16, or float32 where float16 would round them; of plain numbers, empty
    scales: Tensor
    bits: int  # 4 or 8, integers that are unsigned, around 2^(bits - 1); or 16 or 32, plain numbers
    columns: int
    outputs: int
    group_size: int
    fields: Tensor = field(repr=False)  # ``LINEAR_FIELDS``, kept alive for C


def unsupported_reason(bits: int, columns: int, outputs: int, group_size: int) -> str | None:
    """Return why C cannot multiply such a layer here, in words that follow "because"; None: it can."""
    if reason := cpu.unsupported_reason():
        return reason
    if bits not in (4, 8):
        return f"it holds 4 or 8 bits, not {bits}"
    if group_size not in GROUP_SIZES or columns % group_size:
        return f"groups of {group_size} of {columns} columns are not of {', '.join(map(str, GROUP_SIZES))}"
    if outputs % OUTPUTS:
        return f"{outputs} outputs are not a multiple of {OUTPUTS}"
    return None


def pack(integers: Tensor, scales: Tensor, bits: int) -> PackedWeights:
    """Arrange a layer for C.

    Args:
        integers: uint8 [outputs, columns], around 2^(bits - 1).
        scales: float32 [outputs, groups].
        bits: 4 or 8.
    """
    outputs, columns = integers.shape
    group_size = columns // scales.shape[1]
    if reason := unsupported_reason(bits, columns, outputs, group_size):
        raise ValueError(f"the weights cannot be packed because {reason}")
    # [blocks, 32 outputs, steps, nibbles, 4 columns] → [blocks, steps, nibbles, 32 outputs, 4 columns]
    nibbles = 8 // bits
    parts = integers.view(outputs // OUTPUTS, OUTPUTS, -1, nibbles, 4).permute(0, 2, 3, 1, 4)
    weights = parts[:, :, 0] if bits == 8 else parts[:, :, 0] | (parts[:, :, 1] << 4)
    exact = bool((scales.half().float() == scales).all())
    by_block = scales.view(outputs // OUTPUTS, OUTPUTS, -1).transpose(1, 2)  # [blocks, groups, 32]
    weights, by_block = _aligned(weights), _aligned(by_block.to(torch.float16 if exact else torch.float32))
    values = (
        weights.data_ptr(), by_block.data_ptr(), columns, outputs, group_size, bits, int(exact),
    )  # fmt: skip
    return PackedWeights(weights, by_block, bits, columns, outputs, group_size, torch.tensor(values))


def plain(weight: Tensor) -> PackedWeights | None:
    """Return a matrix that is not quantised for C, as it lies; None: C does not multiply it here."""
    outputs, columns = weight.shape
    here = weight.device.type == "cpu" and weight.dtype in DTYPE_CODES and weight.is_contiguous()
    if not here or columns % GROUP_SIZES[-1] or not columns or cpu.unsupported_reason():
        return None
    bits = 8 * weight.itemsize
    values = weight.data_ptr(), 0, columns, outputs, GROUP_SIZES[-1], bits, 0
    return PackedWeights(weight, weight[:0], bits, columns, outputs, GROUP_SIZES[-1], torch.tensor(values))


def multiply(x: Tensor, layer: PackedWeights, dtype: torch.dtype | None = None) -> Tensor:
    """Return x Wᵀ, float32 or bfloat16 [rows, columns] → [rows, outputs] of that dtype, or of another.

    For integers, activations are rounded to 16 bits by group, and sums over a group are exact; for bfloat16,
    activations may be rounded to it. Totals are float32.
    """
    if x.dtype not in DTYPE_CODES or x.device.type != "cpu" or x.dim() != 2 or x.shape[1] != layer.columns:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}, not float32 or bfloat16 "
            f"[rows, {layer.columns}] on the CPU"
        )
    x, rows = x.contiguous(), len(x)
    y = torch.empty(rows, layer.outputs, dtype=dtype or x.dtype)
    workspace = torch.empty(activation_bytes(rows, layer.columns), dtype=torch.uint8)
    cpu.call("linear", layer.fields, x, y, workspace, rows, DTYPE_CODES[x.dtype], DTYPE_CODES[y.dtype])
    return y


def unpack(layer: PackedWeights, dtype: torch.dtype) -> Tensor:
    """Return the weight as plain numbers, float32 or bfloat16 [columns, outputs]."""
    if dtype not in DTYPE_CODES:
        raise ValueError(f"weights are unpacked to float32 or bfloat16, not to {dtype}")
    weight = torch.empty(layer.columns, layer.outputs, dtype=dtype)
    cpu.call("quantised_unpack", layer.fields, weight, DTYPE_CODES[dtype])
    return weight


def activation_bytes(rows: int, columns: int) -> int:
    """Return the bytes of rows as C multiplies them: float32, or 16 bits with two numbers for each group."""
    return 4 * rows * columns


def _aligned(tensor: Tensor) -> Tensor:
    """Return the same numbers, contiguous, at the start of a cache line."""
    space = torch.empty(tensor.nbytes + _LINE, dtype=torch.uint8)
    start = -space.data_ptr() % _LINE
    moved = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)
