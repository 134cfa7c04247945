"""Choosing the grid before rounding: plain min/max, or a search for the scale that costs least.

The search minimises Σ_j h_j |w_j − q_j|^p over scale candidates, then refines the best in closed form.
With ``h = diag(H)`` and p = 2 this is the diagonal part of GPTQ's own objective.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qwenq.gptq.columns import avx512_why_not
from qwenq.gptq.grid import Grid, storable

ScaleSearch = Literal["hessian", "mse", "none"]

SHRINK = torch.linspace(1.0, 0.45, 12)  # candidates, as fractions of the min/max scale
REFITS = 3  # rounds of least squares for the scale, integers held fixed
CHUNK = {"cpu": 1 << 17}  # weights at a time: the temporaries of a candidate stay in the cache
CHUNK_ELSEWHERE = 1 << 24  # on a GPU a candidate costs its launches: few chunks
LANES = 16  # of a group's weights that compiled code reads at a time
MSE_POWER = 2.4  # IST-DASLab/gptq, quant.py


def search_grid(
    weight: Tensor, importance: Tensor, bits: int, group_size: int, *, sym: bool, search: ScaleSearch
) -> Grid:
    """Pick scales and zero points for a weight matrix.

    Args:
        weight: [rows, in] float32.
        importance: [in] float32, diag(H); only "hessian" reads it.
        bits: 2…8.
        group_size: divides ``in``.
        sym: zero point fixed in the middle.
        search: "hessian" (weighted squared error), "mse" (unweighted, power 2.4) or "none" (min/max).
    """
    rows, width = weight.shape
    grouped = weight.reshape(-1, group_size)  # [rows · groups, group_size]
    start = _symmetric_range if sym else _asymmetric_range
    scales, zeros = start(grouped, bits)
    if native_why_not(weight, group_size, search) is None:
        from qwenq.gptq.native_scales import search_natively

        search_natively(grouped.contiguous(), importance, scales, zeros, bits, sym=sym)
    elif search != "none":
        search_by_torch(grouped, importance, scales, zeros, bits, sym=sym, search=search)
    shape = (rows, width // group_size)
    return Grid(bits, group_size, storable(scales.reshape(shape)), zeros.reshape(shape))


def native_why_not(weight: Tensor, group_size: int, search: ScaleSearch) -> str | None:
    """Why compiled code does not search, in words that follow "because"; None: it does."""
    if search != "hessian":
        return f"that is for a search by the Hessian, not for {search}"
    if group_size % LANES:
        return f"that is for groups of a multiple of {LANES}, not of {group_size}"
    return avx512_why_not(weight)


def search_by_torch(
    grouped: Tensor,
    importance: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    *,
    sym: bool,
    search: ScaleSearch,
) -> None:
    """Replace the scales and zeros of min/max by those that cost least.

    Args:
        grouped: [rows · groups, group_size] float32, row by row.
        importance: [groups · group_size] float32.
        scales, zeros: [rows · groups] float32; changed in place.
        bits, sym, search: see ``search_grid``.
    """
    count, group_size = grouped.shape
    weights = importance if search == "hessian" else torch.ones_like(importance)
    per_group = weights.reshape(-1, group_size).repeat(count * group_size // len(weights), 1)
    power = 2.0 if search == "hessian" else MSE_POWER
    step = max(1, CHUNK.get(grouped.device.type, CHUNK_ELSEWHERE) // group_size)
    for at in range(0, count, step):
        part = slice(at, at + step)
        w, h = (x[part].T.contiguous() for x in (grouped, per_group))  # [group_size, groups]
        scales[part], zeros[part] = _best(w, h, scales[part], zeros[part], bits, sym=sym, power=power)


def _symmetric_range(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The largest weight meets the grid's longer, negative side: its scale is negative if it is positive."""
    high, low = grouped.amax(1), grouped.amin(1)
    half = 1 << (bits - 1)
    scales = torch.where(high > -low, -high, -low) / half
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, torch.full_like(scales, float(half))


def _asymmetric_range(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    high, low = grouped.amax(1).clamp_(min=0), grouped.amin(1).clamp_(max=0)
    levels = (1 << bits) - 1
    # The zero point is at least 1 (0 has no safe form in the v1 layout): one step is lost to weights above 0.
    scales = torch.maximum((high - low) / levels, high / (levels - 1))
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, (-low / scales).round_().clamp_(1, levels)


def _best(
    w: Tensor, h: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, sym: bool, power: float
) -> tuple[Tensor, Tensor]:
    """Try every candidate on a chunk of groups, [group_size, n], and keep each group's best."""
    levels = (1 << bits) - 1
    best_cost = torch.full_like(scales, torch.inf)
    best_scale, best_zero = scales.clone(), zeros.clone()
    low = -zeros * scales  # real value of integer 0, kept in proportion by asymmetric candidates

    def steps(scale: Tensor, zero: Tensor) -> Tensor:
        return (w / scale).add_(zero).round_().clamp_(0, levels).sub_(zero)

    def consider(scale: Tensor, zero: Tensor) -> None:
        scale = scale.half().float()  # judged as it will be read back: at 8 bits this moves integers
        gap = steps(scale, zero).mul_(scale).sub_(w)
        cost = _total((gap.square_() if power == 2 else gap.abs_().pow_(power)).mul_(h))
        better = cost < best_cost
        torch.where(better, cost, best_cost, out=best_cost)
        torch.where(better, scale, best_scale, out=best_scale)
        torch.where(better, zero, best_zero, out=best_zero)

    for fraction in SHRINK.tolist():
        scale = scales * fraction
        zero = zeros if sym else (-low * fraction / scale).round_().clamp_(1, levels)
        consider(scale, zero)
    for _ in range(REFITS):
        q = steps(best_scale, best_zero)
        hq = h * q
        scale = _total(hq * w) / _total(hq.mul_(q))  # least squares for the scale under h
        scale = torch.where(torch.isfinite(scale) & (scale != 0), scale, best_scale)
        consider(scale, best_zero.clone())
    return best_scale, best_zero


def _total(shares: Tensor) -> Tensor:
    """The sum of each group's shares, [group_size, n] → [n], in the order in which compiled code adds.

    The order decides which of two candidates wins that cost the same but for rounding: on every machine it
    has to be the same one. The shares are changed.
    """
    if len(shares) % LANES:
        return shares.sum(0)
    first, *others = shares.split(LANES)
    for lanes in others:
        first += lanes
    for half in (8, 4, 2):
        first[:half] += first[half : 2 * half]
    return torch.add(first[0], first[1])  # a view would keep the shares in memory
