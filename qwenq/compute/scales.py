"""Search a group's scale: the candidate of least error under the Hessian's diagonal.

C and torch choose the same scales bit for bit, on every variant: the order of additions is the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwenq.compute import columns, cpu

SHRINK = torch.linspace(1.0, 0.45, 12)  # candidates, as fractions of the min/max scale
REFITS = 3  # rounds of least squares for the scale, integers held fixed; as in csrc/scales.c
CHUNK = {"cpu": 1 << 17}  # weights at a time: the temporaries of a candidate stay in the cache
CHUNK_ELSEWHERE = 1 << 24  # on a GPU a candidate costs its launches: few chunks
LANES = 16  # sums of a group that C keeps side by side
MSE_POWER = 2.4  # IST-DASLab/gptq, quant.py


class Groups(NamedTuple):
    """Groups of weights whose scales are searched."""

    weights: Tensor  # [rows · groups, group_size] float32, row by row
    importance: Tensor  # [groups · group_size] float32
    scales: Tensor  # [rows · groups] float32, contiguous: those of min/max; changed in place
    zeros: Tensor  # likewise
    bits: int  # 2…8
    sym: bool  # whether the zero points stay
    # whether squared errors are weighted by importance; else unweighted errors^2.4 are summed
    weighted: bool = True


def unsupported_reason(weights: Tensor, group_size: int, *, weighted: bool) -> str | None:
    """Return why C does not search, in words that follow "because"; None: it does."""
    if not weighted:
        return "that is for a search by the Hessian"
    if group_size % LANES:
        return f"that is for groups of a multiple of {LANES}, not of {group_size}"
    return columns.unsupported_reason(weights)


def search_scales(groups: Groups) -> None:
    """Replace the scales and zeros of min/max by those that cost least."""
    weights = groups.weights
    if unsupported_reason(weights, weights.shape[1], weighted=groups.weighted):
        search_by_torch(groups)
    else:
        search_by_c(groups._replace(weights=weights.contiguous(), importance=groups.importance.contiguous()))


def search_by_c(groups: Groups) -> None:
    """Search as ``search_scales`` does, weighted."""
    weights, importance, scales, zeros, bits, sym, _ = groups
    count, size = weights.shape
    shapes = ((count, size), importance.shape[:1], (count,), (count,))
    for name, x, shape in zip(groups._fields, groups[:4], shapes, strict=False):
        cpu.require(name, x, torch.float32, shape)
    if size % LANES or importance.numel() % size or count % (importance.numel() // size):
        raise ValueError(f"{count} groups of {size} weights, and importance of {importance.numel()}")
    cpu.call(
        "search_scales", weights, importance, scales, zeros, SHRINK, count, importance.numel() // size, size,
        len(SHRINK), float((1 << bits) - 1), int(sym),
    )  # fmt: skip


def search_by_torch(groups: Groups) -> None:
    """Search as ``search_scales`` does, on any device."""
    weights, importance, scales, zeros, bits, sym, weighted = groups
    count, group_size = weights.shape
    importance = importance if weighted else torch.ones_like(importance)
    per_group = importance.reshape(-1, group_size).repeat(count * group_size // len(importance), 1)
    power = 2.0 if weighted else MSE_POWER
    step = max(1, CHUNK.get(weights.device.type, CHUNK_ELSEWHERE) // group_size)
    for at in range(0, count, step):
        part = slice(at, at + step)
        w, h = (x[part].T.contiguous() for x in (weights, per_group))  # [group_size, groups]
        scales[part], zeros[part] = _best(w, h, scales[part], zeros[part], bits, sym=sym, power=power)


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
    """Sum each group's shares, [group_size, n] → [n], in the order in which compiled code adds.

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
