"""GPTQ's column-by-column rounding (arXiv 2210.17323, Algorithm 1) with static groups and lazy blocks.

The weight is kept transposed: a column of W, which the algorithm rounds and propagates at once, is then
contiguous, and the rank-1 update touches whole cache lines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qwenq.compute.columns import Block, round_columns
from qwenq.gptq.grid import Grid

PANEL = 192  # columns of a triangular or symmetric matrix that are solved for or multiplied by at a time
BLOCK = 64  # columns per lazy update (§3.3, step 2). The paper has 128; on a CPU shorter rank-1 updates win


def inverse_factor(H: Tensor, order: Tensor | None = None) -> tuple[Tensor | None, int]:
    """U, upper triangular with Uᵀ U = H⁻¹ (Algorithm 1's Cholesky factor), and LAPACK's failure code.

    With J the reversal of rows and columns, J H J = L Lᵀ is an ordinary Cholesky factorisation, and
    U = J L⁻¹ J: one factorisation and one triangular inverse, H⁻¹ itself is never formed. Beside H it holds
    two matrices of its size at most, which decides the peak memory of a wide layer.

    Args:
        H: [in, in] float32 or float64, symmetric.
        order: [in] int64: factorise H with rows and columns in this order; None is as they are.

    Returns:
        U [in, in], and 0; or None, and the order of the leading minor that is not positive.
    """
    width = H.shape[0]
    order = torch.arange(width, device=H.device) if order is None else order
    backwards = order.flip(0)
    L, info = torch.linalg.cholesky_ex(H.index_select(0, backwards).index_select(1, backwards))
    if failed := int(info):
        return None, failed
    _invert_lower(L)
    # NaN where L has one; isfinite(L) would be a copy of L and two masks. LAPACK keeps columns in one piece.
    low, high = torch.aminmax(L.T)
    return (L.flip(0, 1), 0) if math.isfinite(low) and math.isfinite(high) else (None, width)


def _invert_lower(L: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse, a panel of rows after the other, from above.

    With X the inverse so far, rows [M D] become [−D⁻¹ M X, D⁻¹]: nearly all of the work is products, nothing
    is multiplied by the zeros of X, and there is no second matrix.
    """
    for rows in panels(L.shape[0]):
        start, size = rows.start, rows.stop - rows.start
        identity = torch.eye(size, dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L[rows, rows], identity, upper=False)
        left = L[rows, :start]
        for panel in panels(start):  # of M X: of what is replaced, nothing to its right needs it
            left[:, panel] = left[:, panel.start :] @ L[panel.start : start, panel]
        left.copy_(inverse.neg() @ left)
        L[rows, rows] = inverse


def panels(width: int) -> list[slice]:
    """The columns of a matrix, PANEL at a time."""
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]


class Rounded(NamedTuple):
    """Integers, and what they cost.

    Attributes:
        integers: [rows, in] uint8, natural column order.
        errors: [rows], the same figure as ``output_error``, for nothing: with H⁻¹ = Uᵀ U the rounding errors
            E that were pushed on satisfy W − Q = E U, so (W − Q) H (W − Q)ᵀ = E Eᵀ.
    """

    integers: Tensor
    errors: Tensor


def gptq(W: Tensor, U: Tensor, grid: Grid, order: Tensor | None = None, block: int = BLOCK) -> Rounded:
    """Round W column by column, pushing each column's error onto the columns not yet rounded.

    Args:
        W: [rows, in] float32 or float64.
        U: [in, in], ``inverse_factor`` of H, its rows and columns already in ``order``.
        grid: scales and zeros in natural column order (static groups: fixed before the first column).
        order: [in] int64, the columns in the order in which they are rounded; None is natural order.
        block: columns per lazy update.
    """
    rows, width = W.shape
    order = torch.arange(width, device=W.device) if order is None else order
    groups = (order // grid.group_size).tolist()
    scales = grid.scales.T.to(W.dtype).contiguous()  # [groups, rows]
    zeros = grid.zeros.T.to(W.dtype).contiguous()
    work = W.T[order]  # [in, rows]
    integers = torch.empty(width, rows, dtype=torch.uint8, device=W.device)
    cost = torch.zeros(rows, dtype=W.dtype, device=W.device)
    for start in range(0, width, block):
        end = min(start + block, width)
        here, errors = slice(start, end), torch.empty(end - start, rows, dtype=W.dtype, device=W.device)
        cost += round_columns(
            Block(work[here], U[here, here], scales, zeros, groups[here], grid.levels, integers[here], errors)
        )
        work[end:].addmm_(U[here, end:].T, errors, alpha=-1)  # beyond the block, once per block
    natural = integers.index_select(0, torch.argsort(order))
    return Rounded(natural.T.contiguous(), cost / 2)


def act_order(H: Tensor) -> Tensor:
    """Columns by falling diag(H): the ones that cost most are rounded while most can still compensate."""
    return torch.argsort(H.diagonal(), descending=True, stable=True)


def output_error(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """½ tr((W − Q) H (W − Q)ᵀ) per row: the mean squared change of the layer's output per token, [rows].

    H is symmetric: panels above its diagonal count twice, what lies below them is not read.
    """
    D = W - Q
    total = torch.zeros_like(D[:, 0])
    for panel in panels(D.shape[1]):
        own, above = D[:, panel], slice(panel.start)
        DH = torch.addmm(own @ H[panel, panel], D[:, above], H[above, panel], alpha=2)
        total += (DH * own).sum(1)
    return total / 2
