"""Round the columns of a lazy block (GPTQ), move them (coordinate descent), or fit a group's scale.

Each operation runs in C on a CPU, by one Triton kernel on a GPU, else in torch. C and torch find the same
integers and errors bit for bit, on every variant: a product is rounded before it is subtracted. The sums of a
fitted scale are in another order in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwenq.compute import cpu, gpu

LARGEST = torch.finfo(torch.float16).max
SMALLEST = torch.finfo(torch.float16).smallest_normal
STRIP = 64  # rows that C takes at a time: its workspace, see csrc/gptq.c
LEAST_ROWS = 16  # rows that C takes at least: a register of any variant
WIDEST_GROUP = 256
"""Columns of a group whose scale C fits; a wider one is a matrix product that the library is faster at."""


class Block(NamedTuple):
    """Columns that are rounded one after the other, and memory for the result."""

    columns: Tensor  # [block, rows] float, a column of W in each row, contiguous; changed in place
    U: Tensor  # [block, block] of the same dtype, upper triangular: the block's part of ``inverse_factor``
    scales: Tensor  # [groups, rows] of the same dtype, contiguous
    zeros: Tensor  # [groups, rows] of the same dtype, contiguous
    groups: list[int]  # the group of each column
    levels: int  # the largest integer
    integers: Tensor  # [block, rows] uint8, contiguous: filled
    errors: Tensor  # [block, rows] of the same dtype, contiguous: filled with (w_i − q_i) / U_ii


class Fitted(NamedTuple):
    """A group after its scale was fitted."""

    scale: Tensor  # [rows]
    values: Tensor  # [group_size, rows], the dequantised integers
    less: Tensor  # [group_size, rows], the values before, less these
    change: Tensor  # [rows], of ``output_error``, by the scale alone


def unsupported_reason(x: Tensor) -> str | None:
    """Return why C does not take a tensor, in words that follow "because"; None: it does."""
    return cpu.unsupported_input(x.device, x.dtype, [torch.float32])


def _suits_c(block: Block) -> bool:
    return block.columns.shape[1] >= LEAST_ROWS and unsupported_reason(block.columns) is None


def triton_unsupported_reason(columns: Tensor) -> str | None:
    """Return why the GPU's kernel does not take columns, in words that follow "because"; None: it does."""
    if columns.device.type != "cuda":
        return f"that is for NVIDIA GPUs, not for {columns.device.type}"
    if columns.dtype != torch.float32 or columns.numel() >= 1 << 31:
        return "that is for float32, and for fewer than 2³¹ numbers"
    return gpu.unsupported_reason(columns.device)


def fallback_reason(device: torch.device) -> str | None:
    """Return what a machine or an installation lacks for compiled kernels; None: nothing."""
    return gpu.unsupported_reason(device) if device.type == "cuda" else cpu.unsupported_reason()


def round_columns(block: Block) -> Tensor:
    """Fill integers and errors; return Σ error² over the columns, [rows]."""
    if triton_unsupported_reason(block.columns) is None:
        return by_triton(block)
    return by_c(block) if _suits_c(block) else round_by_torch(block)


def by_c(block: Block, values: Tensor | None = None) -> Tensor:
    """Round as ``round_columns`` does, or with values move as ``move_columns``; the columns are kept."""
    moved = block.columns if values is None else values
    _check(block, moved)
    kernel, factors = ("round_columns", block.U.T) if values is None else ("move_columns", block.U)
    groups, costs = torch.tensor(block.groups), torch.empty_like(block.columns[0])
    cpu.call(
        kernel, block.columns, moved, factors.contiguous(), block.scales, block.zeros, groups, block.integers,
        block.errors, costs, _workspace(block), *block.columns.shape, float(block.levels),
    )  # fmt: skip
    return costs


def by_triton(block: Block, values: Tensor | None = None) -> Tensor:
    """Round as ``round_columns`` does, which changes the columns, or with values move as ``move_columns``."""
    from qwenq.compute.triton.columns import run_columns

    if values is None:
        return run_columns(block.columns, block.columns, *block[1:], moves=False)
    return run_columns(block.columns.clone(), values, *block[1:], moves=True)


def round_by_torch(block: Block) -> Tensor:
    """Round as ``round_columns`` does, on any device, in float32 or float64."""
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


def move_columns(block: Block, values: Tensor) -> Tensor:
    """Move each integer to the best value given all others; return the change of ``output_error``, [rows].

    Args:
        block: with G = (Q − W) H in place of W and H in place of U: ``columns`` are [block, rows] of G, ``U``
            is [block, block] of H. ``errors`` are filled with the old values less the new ones.
        values: [block, rows] of the same dtype, contiguous: the columns of Q.
    """
    if triton_unsupported_reason(block.columns) is None:
        return by_triton(block, values)
    return by_c(block, values) if _suits_c(block) else move_by_torch(block, values)


def move_by_torch(block: Block, values: Tensor) -> Tensor:
    """Move as ``move_columns`` does, on any device, in float32 or float64."""
    gradient, H, groups = block.columns.clone(), block.U, block.groups
    pivots = H.diagonal().tolist()
    views = zip(gradient.unbind(), values.unbind(), block.errors.unbind(), H.unbind(), strict=True)
    for i, (g, value, less, h) in enumerate(views):
        scale, zero = block.scales[groups[i]], block.zeros[groups[i]]
        wanted = torch.sub(value, torch.div(g, pivots[i]))  # q_i − G_i / H_ii
        z = wanted.div_(scale).add_(zero).round_().clamp_(0, block.levels)
        block.integers[i] = z
        torch.sub(value, z.sub_(zero).mul_(scale), out=less)
        if i + 1 < len(gradient):
            gradient[i + 1 :].sub_(torch.outer(h[i + 1 :], less))
    # These gradients have kept the values that the moves were made from.
    halves = H.diagonal()[:, None] / 2
    return (block.errors * (block.errors * halves - gradient)).sum(0)


def fit_scale(block: Block, values: Tensor, group: int) -> Fitted:
    """Return the group with a better scale, as it is stored (rounded to float16), else with the one it has.

    With u = integers − zero, G the gradient and H the group's own block, the objective is a parabola in the
    scale: it changes by δ · uᵀG + δ²/2 · uᵀHu, least at δ = −uᵀG / uᵀHu (the second stage of arXiv
    2602.02126, by group).

    Args:
        block: a whole group as ``move_columns`` has left it, with the gradients as they were before.
        values: [group_size, rows] before that.
        group: its number among ``block.scales``.
    """
    if len(block.columns) > WIDEST_GROUP or not _suits_c(block):
        return fit_by_torch(block, values, group)
    return fit_by_c(block, values, group)


def fit_by_c(block: Block, values: Tensor, group: int) -> Fitted:
    """Fit as ``fit_scale`` does, groups of at most ``WIDEST_GROUP`` columns."""
    _check(block, values)
    if len(block.columns) > WIDEST_GROUP:
        raise ValueError(f"a group of {len(block.columns)} columns, more than {WIDEST_GROUP}")
    old, zero = block.scales[group], block.zeros[group]
    fitted = Fitted(*(torch.empty_like(like) for like in (old, values, values, old)))
    cpu.call(
        "fit_scale", block.columns, values, block.U.contiguous(), old, zero, block.integers, block.errors,
        *fitted, _workspace(block), *block.columns.shape,
    )  # fmt: skip
    return fitted


def fit_by_torch(block: Block, values: Tensor, group: int) -> Fitted:
    """Fit as ``fit_scale`` does, on any device, in float32 or float64."""
    old = block.scales[group]
    u = block.integers.to(old.dtype) - block.zeros[group]
    Hu = block.U @ u  # [group_size, rows]
    # The moves changed G by −H · errors, H is symmetric.
    slope = (u * block.columns - block.errors * Hu).sum(0)
    curve = (u * Hu).sum(0)
    wanted = old - slope / curve
    stored = torch.where(wanted.isfinite() & (wanted != 0), storable(wanted), old)
    step = stored - old
    change = step * (slope + step * (curve / 2))
    better = change < 0
    scale = torch.where(better, stored, old)
    now = u.mul_(scale)
    return Fitted(scale, now, values - now, torch.where(better, change, 0.0))


def storable(scales: Tensor) -> Tensor:
    """Return scales as the file will hold them: rounded to float16, never zero or infinite, in float32."""
    half = scales.clamp(-LARGEST, LARGEST).half().float()
    tiny = half.abs() < SMALLEST
    return torch.where(tiny, torch.where(scales < 0, -SMALLEST, SMALLEST), half)


def _workspace(block: Block) -> Tensor:
    """Return memory for a strip of all columns for each thread."""
    return torch.empty(torch.get_num_threads(), len(block.columns), STRIP)


def _check(block: Block, values: Tensor) -> None:
    """Check shapes, dtypes and strides against what ``Block`` says."""
    count, rows = block.columns.shape
    cpu.require("U", block.U, torch.float32, (count, count), contiguous=False)
    cpu.require("integers", block.integers, torch.uint8, (count, rows))
    for name, x in (("columns", block.columns), ("errors", block.errors), ("values", values)):
        cpu.require(name, x, torch.float32, (count, rows))
    for name, x in (("scales", block.scales), ("zeros", block.zeros)):
        cpu.require(name, x, torch.float32, (len(block.scales), rows))
    if rows < LEAST_ROWS:
        raise ValueError(f"{rows} rows, fewer than {LEAST_ROWS}")
    if len(block.groups) != count or min(block.groups) < 0 or max(block.groups) >= len(block.scales):
        raise ValueError(f"{count} columns in groups {block.groups} of {len(block.scales)}")
