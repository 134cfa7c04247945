"""Round a weight column by column as GPTQ does, with static groups and lazy blocks (arXiv 2210.17323).

The layer-wise objective is the paper's Eq. (1), for each row w of W with values q on a grid:

    ‖(w − q) X‖² = n/2 · (w − q) H (w − q)ᵀ,   H = 2/n · X Xᵀ over n tokens

Rounding column i of those that are left costs (w_i − q_i)² / [H⁻¹]_ii, and the best change of the columns
after it is − (w_i − q_i) / [H⁻¹]_ii · [H⁻¹]_i,: (Eq. 2). Eq. (3) then removes i from H⁻¹; all these inverses
are known in advance: with H⁻¹ = Uᵀ U, U upper triangular (Step 3, the Cholesky factor), the rows that Eq. (2)
reads are U_ii · U_i,:. That leaves Algorithm 1:

    e = (w_i − q_i) / U_ii,   w_j ← w_j − e · U_ij for j > i

A block's errors reach the columns behind it in one product (Eq. 4, Step 2). The weight is kept transposed: a
column of W, which is rounded and propagated at once, is then contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qwenq.compute.columns import Block, round_columns
from qwenq.compute.grid import Grid, Rounded, ScaleSearch, round_to_nearest, search_grid
from qwenq.errors import QuantisationError, UsageError
from qwenq.gptq.coordinate_descent import descend

PANEL = 192  # columns of a triangular or symmetric matrix that are solved for or multiplied by at a time
BLOCK = 64  # columns per lazy update. The paper has 128; on a CPU shorter rank-1 updates win
BISECTIONS = 6
"""After the first success: the damping found is within 10^(1/2^6) = 4 % of the least that works."""
LARGEST_DAMP = 1e4  # beyond this H is noise: rounding to nearest would be as good


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid: ``dequantized = scales · (integers − zeros)``, group by group.

    Attributes:
        integers: [out, in] uint8 in 0 … 2^bits − 1.
        scales: [out, groups] float32, exactly representable in float16; may be negative.
        zeros: [out, groups] float32 holding integers.
        dequantized: [out, in] float32, Q.
        error: tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ), the share of the output's energy that is lost, H damped.
        rtn_error: the same for round-to-nearest on a min/max grid.
        damp: the share of H's mean diagonal that was added to it, at least what was asked for.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    dequantized: Tensor
    error: float
    rtn_error: float
    damp: float


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: Literal["static", "none"] = "static",
    scale_search: ScaleSearch = "hessian",
    damp: float = 0.1,
    coordinate_descent: bool = True,
) -> QuantizedWeight:
    """Quantise one weight given the Hessian of its inputs: minimise tr((W − Q) H (W − Q)ᵀ) over Q on a grid.

    The steps: damping (H + damp · mean(diag H) · I), a grid by ``search_grid``, GPTQ (Algorithm 1 of arXiv
    2210.17323), coordinate descent on integers and scales from there. The defaults are those of `qwenq
    quantize`; ``scale_search="none", damp=0.01, coordinate_descent=False`` is GPTQ as in the paper.

        H = 2 / len(X) * X.T @ X          # X: [tokens, in], the inputs of the layer
        result = quantize_weight(layer.weight.data, H, bits=4, group_size=128)
        layer.weight.data.copy_(result.dequantized)

    Args:
        weight: [out, in], W, any float dtype.
        hessian: [in, in], H, symmetric; a factor before it changes nothing.
        bits: 2…8.
        group_size: input columns that share a scale, a divisor of ``in``; -1: all of them.
        sym: whether all zero points are in the middle, 2^(bits − 1).
        act_order: "static" rounds columns by falling diag(H), in groups of the natural order; "none" rounds
            them from the first to the last.
        scale_search: "hessian" (error weighted by diag H), "mse" (unweighted) or "none" (min/max).
        damp: share of H's mean diagonal that is added to it; raised where H cannot be inverted otherwise.
        coordinate_descent: whether integers and scales are improved after GPTQ (QuantEase, two sweeps).

    Raises:
        UsageError: shapes do not fit, or a setting is out of its range.
        QuantisationError: H holds NaN or Inf, or no damping makes it positive definite.
    """
    width = weight.shape[-1]
    size = width if group_size == -1 else group_size
    _require(weight.ndim == 2 and weight.numel() > 0, f"a weight [out, in], not {list(weight.shape)}")
    _require(hessian.shape == (width, width), f"a Hessian [{width}, {width}], not {list(hessian.shape)}")
    _require(2 <= bits <= 8, f"2 to 8 bits, not {bits}")
    _require(size > 0 and width % size == 0, f"a group size that divides {width}, not {group_size}")
    _require(act_order in ("static", "none"), f"act_order static or none, not {act_order!r}")
    _require(scale_search in get_args(ScaleSearch), f"a scale_search that exists, not {scale_search!r}")
    _require(damp > 0, f"damp above 0, not {damp}")
    W, H = weight.detach().float(), hessian.detach().to(weight.device, torch.float32)
    order = order_by_diagonal(H) if act_order == "static" else torch.arange(width, device=H.device)
    damped = damp_hessian(H.clone(), damp, order)
    grid, rounded = solve(
        W, damped, bits, size, sym=sym, scale_search=scale_search, coordinate_descent=coordinate_descent
    )
    Q = grid.values(rounded.integers)
    values = (Q, round_to_nearest(W, bits, size, sym=sym), torch.zeros_like(W))
    lost, lost_by_rtn, energy = (float(output_error(W, x, damped.H).sum()) for x in values)
    errors = (lost / (energy or 1.0), lost_by_rtn / (energy or 1.0))
    return QuantizedWeight(rounded.integers, grid.scales, grid.zeros, Q, *errors, damped.damp)


def _require(sound: bool, wanted: str) -> None:
    if not sound:
        raise UsageError(
            f"quantize_weight takes {wanted}", hint="see help(qwenq.gptq.solver.quantize_weight)"
        )


def solve(
    W: Tensor,
    hessian: DampedHessian,
    bits: int,
    group_size: int,
    *,
    sym: bool,
    scale_search: ScaleSearch,
    coordinate_descent: bool,
) -> tuple[Grid, Rounded]:
    """Choose a grid for W [rows, in] float32, round W to it, and improve both by coordinate descent."""
    H = hessian.H
    grid = search_grid(W, H.diagonal(), bits, group_size, sym=sym, search=scale_search)
    rounded = gptq(W, hessian.U, grid, hessian.order)
    return descend(W, rounded.integers, grid, H) if coordinate_descent else (grid, rounded)


def gptq(W: Tensor, U: Tensor, grid: Grid, order: Tensor | None = None, block: int = BLOCK) -> Rounded:
    """Round W column by column, pushing each column's error onto the columns not yet rounded.

    The errors E that were pushed on give the cost for nothing: (W − Q) = E U, so with H⁻¹ = Uᵀ U
    (W − Q) H (W − Q)ᵀ = E Eᵀ.

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


def order_by_diagonal(H: Tensor) -> Tensor:
    """Return the columns by falling diag(H) (act-order), [in] int64.

    The ones that cost most are rounded while most can still compensate.
    """
    return torch.argsort(H.diagonal(), descending=True, stable=True)


def output_error(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Return ½ (w − q) H (w − q)ᵀ of each row, [rows]: the mean squared change of its output per token.

    H is symmetric: panels above its diagonal count twice, what lies below them is not read.
    """
    D = W - Q
    total = torch.zeros_like(D[:, 0])
    for panel in panels(D.shape[1]):
        own, above = D[:, panel], slice(panel.start)
        DH = torch.addmm(own @ H[panel, panel], D[:, above], H[above, panel], alpha=2)
        total += (DH * own).sum(1)
    return total / 2


@dataclass(frozen=True)
class DampedHessian:
    """A Hessian that factorises."""

    H: Tensor  # [in, in], damped, natural order
    U: Tensor  # [in, in], ``inverse_factor`` of H in ``order``
    order: Tensor  # [in] int64, the order in which columns are rounded
    damp: float  # the share of the mean diagonal that was added
    dead: int  # number of columns whose input was always zero


def damp_hessian(H: Tensor, damp: float, order: Tensor) -> DampedHessian:
    """Add ``damp`` · mean(diag H) to the diagonal; more, found by bisection, where Cholesky needs it.

    A dead column costs nothing whatever its weight is; its diagonal is set to the mean, which makes GPTQ
    round it to nearest and leave the others alone.

    Args:
        H: [in, in] float32; changed in place.
        damp: GPTQ's ``damp_percent`` as a share.
        order: [in] int64, a permutation of the columns.
    """
    diagonal = H.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantisationError(
            "its input holds NaN or Inf, or values too large to square",
            hint="activations overflowed: use --dtype float32; if they still do, the weights are damaged",
        )
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    diagonal[dead] = mean
    used = 0.0

    def attempt(share: float) -> Tensor | None:
        nonlocal used
        diagonal.add_((share - used) * mean)
        used = share
        return inverse_factor(H, order)

    U = attempt(damp)
    if U is None:
        low, high = damp, damp * 10
        while (U := attempt(high)) is None:
            low, high = high, high * 10
            if high > LARGEST_DAMP:
                raise QuantisationError(
                    "the Hessian is not positive definite whatever the damping",
                    hint="use more, and more varied, calibration text",
                )
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5
            if (found := attempt(middle)) is None:
                low = middle
            else:
                high, U = middle, found
        if used != high:
            diagonal.add_((high - used) * mean)
            used = high
    return DampedHessian(H, U, order, used, int(dead.sum()))


def inverse_factor(H: Tensor, order: Tensor | None = None) -> Tensor | None:
    """Return U, upper triangular with Uᵀ U = H⁻¹ (Algorithm 1's Cholesky factor); None: H has none.

    With J the reversal of rows and columns, J H J = L Lᵀ is an ordinary Cholesky factorisation, and
    U = J L⁻¹ J: one factorisation and one triangular inverse, H⁻¹ itself is never formed. Beside H it holds
    two matrices of its size at most, which decides the peak memory of a wide layer.

    Args:
        H: [in, in] float32 or float64, symmetric.
        order: [in] int64: factorise H with rows and columns in this order; None is as they are.
    """
    order = torch.arange(H.shape[0], device=H.device) if order is None else order
    backwards = order.flip(0)
    L, info = torch.linalg.cholesky_ex(H.index_select(0, backwards).index_select(1, backwards))
    if int(info):  # the order of the first leading minor that is not positive
        return None
    _invert_lower(L)
    # NaN where L has one; isfinite(L) would be a copy of L and two masks. LAPACK keeps columns in one piece.
    low, high = torch.aminmax(L.T)
    return L.flip(0, 1) if math.isfinite(low) and math.isfinite(high) else None


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
    """Return the columns of a matrix, PANEL at a time."""
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]
