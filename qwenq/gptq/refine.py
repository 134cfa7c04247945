"""After GPTQ: lower the same objective further, with its result as the starting point.

    minimise over integers Z and scales s:   tr((Q − W) H (Q − W)ᵀ),   Q = s · (Z − z), per row and group

Two steps that each can only lower it. ``refit_scales`` solves for a row's scales in closed form with the
integers held fixed (the second stage of arXiv 2602.02126). ``descend`` goes once over the columns and moves
each integer to the best value given all others (cyclic coordinate descent, QuantEase, arXiv 2309.01885).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwenq.gptq.grid import Grid, storable
from qwenq.gptq.solver import BLOCK, output_error

RIDGE = 1e-6  # of the mean diagonal: keeps the small systems solvable when a group's integers are all zero


def refit_scales(W: Tensor, integers: Tensor, grid: Grid, H: Tensor) -> Grid:
    """The scales that minimise the objective for fixed integers: one groups × groups system per row.

    They are rounded to float16, as they are stored; a row that this leaves worse off keeps its scales.

    Args:
        W: [rows, in] float32.
        integers: [rows, in] uint8.
        grid: whose zeros are kept.
        H: [in, in].
    """
    rows, width = W.shape
    size = grid.group_size
    groups = width // size
    Z = integers.reshape(rows, groups, size).to(W.dtype) - grid.zeros[..., None]  # [rows, groups, group_size]
    right = ((W @ H).reshape(rows, groups, size) * Z).sum(2)  # [rows, groups]
    left = torch.empty(rows, groups, groups, dtype=W.dtype, device=W.device)
    for g in range(groups):
        ZH = Z[:, g] @ H[g * size : (g + 1) * size]  # [rows, in]
        left[:, g] = (ZH.reshape(rows, groups, size) * Z).sum(2)
    diagonal = left.diagonal(dim1=1, dim2=2)  # [rows, groups], a view
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(W.dtype).tiny
    scales, _ = torch.linalg.solve_ex(left, right)
    scales = torch.where(torch.isfinite(scales) & (scales != 0), scales, grid.scales)
    refitted = Grid(grid.bits, size, storable(scales), grid.zeros)
    before, after = (output_error(W, each.values(integers), H) for each in (grid, refitted))
    return replace(refitted, scales=torch.where((after < before)[:, None], refitted.scales, grid.scales))


def descend(W: Tensor, integers: Tensor, grid: Grid, H: Tensor, order: Tensor, block: int = BLOCK) -> Tensor:
    """One pass of coordinate descent over the integers.

    With G = H (Q − W)ᵀ, the best real value of column i given all others is q_i − G_i / H_ii.

    Args:
        W: [rows, in] float32.
        integers: [rows, in] uint8, where to start.
        grid: held fixed.
        H: [in, in].
        order: [in] int64, the columns in the order in which they are visited.
        block: columns per lazy update of G.

    Returns:
        [rows, in] uint8.
    """
    width = W.shape[1]
    H = H[order][:, order]
    scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()  # [groups, rows]
    groups = (order // grid.group_size).tolist()
    new = integers.T[order]  # [in, rows]
    Q = grid.values(integers).T[order]  # [in, rows]
    G = H @ (Q - W.T[order])  # [in, rows]
    diagonal = H.diagonal().tolist()
    for start in range(0, width, block):
        end = min(start + block, width)
        moves = torch.empty(end - start, W.shape[0], dtype=W.dtype, device=W.device)
        rows = zip(
            Q[start:end].unbind(), G[start:end].unbind(), moves.unbind(), H[start:end].unbind(), strict=True
        )
        for i, (value, gradient, move, h) in enumerate(rows, start):
            scale, zero = scales[groups[i]], zeros[groups[i]]
            wanted = torch.sub(value, gradient, alpha=1 / diagonal[i])
            z = wanted.div_(scale).add_(zero).round_().clamp_(0, grid.levels)
            new[i] = z
            torch.sub(z.sub_(zero).mul_(scale), value, out=move)
            if i + 1 < end:
                G[i + 1 : end].addr_(h[i + 1 : end], move)
        G[end:].addmm_(H[end:, start:end], moves)
    natural = torch.empty_like(new)
    natural[order] = new
    return natural.T.contiguous()
