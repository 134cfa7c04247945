"""Multiply by 4- and 8-bit weights that are scaled by group: few rows by integers, many unpacked.

C multiplies the integers as they lie (``csrc/linear.c``): a decode step reads every weight once, at the
memory's speed. The reference is ``unpack`` and one product of plain numbers, which is also what is faster for
many rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwenq.compute import cpu

OUTPUTS = 32
"""Outputs of a block of weights; a layer has whole blocks."""
GROUP_SIZES = (128, 64, 32)
"""Columns that may share a scale, the longest first."""
LINEAR_FIELDS = ("weights", "scales", "columns", "blocks", "group_size", "bits", "scales_float16")
"""What C reads of a layer, int64 each."""
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LINE = 64  # bytes: a step of weights begins at a cache line


@dataclass(frozen=True)
class PackedWeights:
    """A layer's weights in the layout of ``csrc/linear.c``.

    Attributes:
        weights: uint8 [blocks, steps, 32 outputs, 4 columns]; with 4 bits the columns 4 … 7 of a step lie in
            the high nibbles.
        scales: [blocks, groups, 32] float16, or float32 where float16 would round them.
        bits: 4 or 8; integers are unsigned, around 2^(bits - 1).
        columns, outputs, group_size: of the weight.
        fields: ``LINEAR_FIELDS``, kept alive for C.
    """

    weights: Tensor
    scales: Tensor
    bits: int
    columns: int
    outputs: int
    group_size: int
    fields: Tensor = field(repr=False)


def unsupported_reason(bits: int, columns: int, outputs: int, group_size: int) -> str | None:
    """Return why C cannot multiply such a layer here, in words that follow "because"; None: it can."""
    if reason := cpu.unsupported_reason():
        return reason
    if bits not in (4, 8):
        return f"it holds 4 or 8 bits, not {bits}"
    if group_size not in GROUP_SIZES or columns % group_size:
        return f"groups of {group_size} of {columns} columns are not of {', '.join(map(str, GROUP_SIZES))}"
    if outputs % OUTPUTS:
        return f"{outputs} outputs are no multiple of {OUTPUTS}"
    return None


def pack(integers: Tensor, scales: Tensor, bits: int) -> PackedWeights:
    """Arrange a layer for C.

    Args:
        integers: uint8 [outputs, columns], around 2^(bits - 1).
        scales: float32 [outputs, groups].
        bits: 4 or 8.

    Raises:
        ValueError: sizes that ``unsupported_reason`` refuses.
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
        weights.data_ptr(), by_block.data_ptr(), columns, outputs // OUTPUTS, group_size, bits, int(exact),
    )  # fmt: skip
    return PackedWeights(weights, by_block, bits, columns, outputs, group_size, torch.tensor(values))


def multiply(x: Tensor, layer: PackedWeights) -> Tensor:
    """Return x Wᵀ, float32 or bfloat16 [rows, columns] → [rows, outputs] of that dtype.

    Activations are rounded to 16 bits by group, sums over a group are exact, totals float32.

    Raises:
        ValueError: another shape, dtype or device than C reads.
    """
    if x.dtype not in _DTYPES or x.device.type != "cpu" or x.dim() != 2 or x.shape[1] != layer.columns:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} on {x.device}, not float32 or bfloat16 "
            f"[rows, {layer.columns}] on the CPU"
        )
    x, rows = x.contiguous(), len(x)
    y = torch.empty(rows, layer.outputs, dtype=x.dtype)
    workspace = torch.empty(activation_bytes(rows, layer.columns, layer.group_size), dtype=torch.uint8)
    cpu.call("quantised_linear", layer.fields, x, y, workspace, rows, _DTYPES[x.dtype])
    return y


def unpack(layer: PackedWeights, dtype: torch.dtype) -> Tensor:
    """Return the weight as plain numbers, float32 or bfloat16 [columns, outputs].

    Raises:
        ValueError: another dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"weights are unpacked to float32 or bfloat16, not to {dtype}")
    weight = torch.empty(layer.columns, layer.outputs, dtype=dtype)
    cpu.call("quantised_unpack", layer.fields, weight, _DTYPES[dtype])
    return weight


def activation_bytes(rows: int, columns: int, group_size: int) -> int:
    """Return the bytes of rows in 16 bits: two bytes a column, and a scale and a sum for each group."""
    return rows * (2 * columns + 8 * (columns // group_size))


def _aligned(tensor: Tensor) -> Tensor:
    """Return the same numbers, contiguous, at the start of a cache line."""
    space = torch.empty(tensor.nbytes + _LINE, dtype=torch.uint8)
    start = -space.data_ptr() % _LINE
    moved = space[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return moved.copy_(tensor)
