"""Compare GPTQ's columns and coordinate descent on a GPU with float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qwenq.compute.grid import Grid, search_grid
from qwenq.gptq.coordinate_descent import descend
from qwenq.gptq.solver import damp_hessian, gptq, order_by_diagonal, output_error

ALLOWED = 0.01
"""More error of the output than float64's integers have: a tie that breaks otherwise changes what follows."""


def solver_checks(device: torch.device, tiny: bool) -> Iterator[tuple[str, float]]:
    """Names, and the largest share of ``ALLOWED`` by which a matrix came out worse than in float64.

    Args:
        device: where float32 is solved; float64 is by torch's own loop there.
        tiny: small enough for a dry run.
    """
    rows, width = (48, 128) if tiny else (1000, 1024)
    for bits, group_size, sym in ((4, 128, True), (4, 32, False), (8, 64, True)):
        draw = torch.Generator(device).manual_seed(bits + group_size)
        mixed = torch.randn(width, width, device=device, generator=draw) * width**-0.5
        X = torch.randn(4 * width, width, device=device, generator=draw) @ (
            mixed + torch.eye(width).to(device)
        )
        W = torch.randn(rows, width, device=device, generator=draw)
        found, wanted = (
            _solved(W, X, bits, group_size, sym, dtype) for dtype in (torch.float32, torch.float64)
        )
        for step, ours, exact in zip(("columns", "refined"), found, wanted, strict=True):
            worse = float((ours.sum() - exact.sum()) / exact.sum())
            symmetry = "sym" if sym else "asym"
            yield f"gptq {step} int{bits} group {group_size} {symmetry}", worse / ALLOWED


def _solved(
    W: Tensor, X: Tensor, bits: int, group_size: int, sym: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the output errors in float64 after GPTQ and after coordinate descent, [rows] each."""
    H = 2 / len(X) * X.T @ X
    hessian = damp_hessian(H, 0.01, order_by_diagonal(H))
    grid = search_grid(W, hessian.H.diagonal(), bits, group_size, sym=sym, search="hessian")
    W, H, U = (x.to(dtype) for x in (W, hessian.H, hessian.U))
    rounded = gptq(W, U, grid, hessian.order)
    refined, again = descend(W, rounded.integers, grid, H)
    return _error(W, grid, rounded.integers, H), _error(W, refined, again.integers, H)


def _error(W: Tensor, grid: Grid, integers: Tensor, H: Tensor) -> Tensor:
    return output_error(W.double(), grid.values(integers).double(), H.double())
