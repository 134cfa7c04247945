"""The columns of one lazy block: each rounded, its error pushed onto those that follow within the block.

By torch, by compiled code on a CPU, or by one kernel on a GPU. The first two find the same integers bit for
bit: a product is rounded before it is subtracted, while torch's ``addr_`` rounds once where its vectors fit,
and twice in the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwenq.native import gpu, support

AVX512 = "avx512f"
"""What a CPU needs, as LLVM names it."""

FEWEST_ROWS = 16
"""That compiled code takes: a register's."""


class Block(NamedTuple):
    """Columns that are rounded one after the other, and where what comes of them goes.

    Attributes:
        columns: [block, rows] float, a column of W in each row, contiguous; changed in place.
        U: [block, block] of the same dtype, upper triangular: the block's part of ``inverse_factor``.
        scales, zeros: [groups, rows] of the same dtype, contiguous.
        groups: the group of each column.
        levels: the largest integer.
        integers: [block, rows] uint8, contiguous: filled.
        errors: [block, rows] of the same dtype, contiguous: filled with (w_i − q_i) / U_ii.
    """

    columns: Tensor
    U: Tensor
    scales: Tensor
    zeros: Tensor
    groups: list[int]
    levels: int
    integers: Tensor
    errors: Tensor


def round_columns(block: Block) -> Tensor:
    """Fill integers and errors; returns Σ error² over the columns, [rows]."""
    if triton_why_not(block.columns) is None:
        from qwenq.gptq.triton_columns import round_by_triton

        return round_by_triton(block)
    if native_why_not(block.columns) is None:
        from qwenq.gptq.native_columns import round_natively

        return round_natively(block)
    return round_by_torch(block)


def triton_why_not(columns: Tensor) -> str | None:
    """Why columns are not for the GPU's kernel, in words that follow "because"; None: they are."""
    if columns.device.type != "cuda":
        return f"that is for NVIDIA GPUs, not for {columns.device.type}"
    if columns.dtype != torch.float32 or columns.numel() >= 1 << 31:
        return "that is for float32, and for fewer than 2³¹ numbers"
    return gpu.why_not_triton(columns.device)


def missed(device: torch.device) -> str | None:
    """What a machine or an installation lacks for compiled columns, in such words; None: nothing."""
    return gpu.why_not_triton(device) if device.type == "cuda" else support.why_not(AVX512)


def native_why_not(columns: Tensor) -> str | None:
    """Why columns, [any, rows], are left to torch, in words that follow "because"; None: they are not."""
    if columns.shape[-1] < FEWEST_ROWS:
        return f"that is for {FEWEST_ROWS} rows and more, not for {columns.shape[-1]}"
    return avx512_why_not(columns)


def avx512_why_not(x: Tensor) -> str | None:
    """Why a tensor is not for compiled code of 16 float32 at a time, in such words; None: it is."""
    if x.device.type != "cpu":
        return f"that is for CPUs, not for {x.device.type}"
    if x.dtype != torch.float32:
        return f"that is for float32, not for {str(x.dtype).removeprefix('torch.')}"
    return support.why_not(AVX512)


def round_by_torch(block: Block) -> Tensor:
    """See ``round_columns``: any device, float32 or float64."""
    columns, U, groups = block.columns, block.U, block.groups
    diagonal = U.diagonal().tolist()
    # Views are made once per block: at a hundred microseconds a column, indexing would be a third of it.
    views = zip(columns.unbind(), block.errors.unbind(), U.unbind(), strict=True)
    for i, (w, error, u) in enumerate(views):
        scale, zero = block.scales[groups[i]], block.zeros[groups[i]]
        q = torch.div(w, scale).add_(zero).round_().clamp_(0, block.levels)
        torch.sub(w, q.sub_(zero).mul_(scale), out=error).div_(diagonal[i])  # e = (w_i − q_i) / U_ii
        if i + 1 < len(columns):  # W_:,j −= e U_ij for the columns j of this block
            columns[i + 1 :].sub_(torch.outer(u[i + 1 :], error))
    # The columns have kept the values they were rounded from.
    scaled = (columns / block.scales[groups]).add_(block.zeros[groups])
    block.integers.copy_(scaled.round_().clamp_(0, block.levels))
    return block.errors.square().sum(0)
