"""Quantising the linears that share an input: Hessian in, integers and grids out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import QuantisationError
from qwenq.gptq.damping import Damped, damped
from qwenq.gptq.drift import drifted_target
from qwenq.gptq.grid import Grid
from qwenq.gptq.refine import descend, refit_scales
from qwenq.gptq.scales import ScaleSearch, search_grid
from qwenq.gptq.solver import Rounded, act_order, gptq, output_error

MEASURED_ROWS = 256  # evenly spread output rows on which the solver's own figure is checked
SLACK = 1e-6  # of the output's energy: float32 cannot tell two errors apart that are nearer than this


@dataclass(frozen=True)
class Settings:
    """What the algorithm can be told; the recipe holds the same names for users."""

    bits: int
    group_size: int
    sym: bool
    act_order: bool
    scale_search: ScaleSearch
    damp: float
    drift: float
    refine: bool


@dataclass(frozen=True)
class ModuleStats:
    """What quantising one linear cost, as shares of its output's energy over the calibration tokens.

    Attributes:
        error: ‖(W′ − Q) X‖² / ‖W′ X‖², W′ the weight aimed at (``drift``), X including the damping.
        rtn_error: the same for round-to-nearest on a min/max grid.
        damp: the share of the mean diagonal that was added to the Hessian.
        dead: input columns that were always zero.
    """

    error: float
    rtn_error: float
    damp: float
    dead: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class QuantisedLinear:
    """The result for one linear: integers uint8 [out, in] on a grid, and what it cost."""

    integers: Tensor
    grid: Grid
    stats: ModuleStats


def quantise_group(
    weights: dict[str, Tensor], H: Tensor, C: Tensor | None, settings: Settings
) -> dict[str, QuantisedLinear]:
    """Quantise linears that read the same input, as one matrix: rows do not influence each other.

    Args:
        weights: name → [out, in] float32; all with the same ``in``.
        H: [in, in] float32, their common Hessian; changed in place (damping).
        C: [in, in] float32 from ``Drift``; None: their inputs have not drifted.
        settings: see ``Settings``.

    Raises:
        QuantisationError: the Hessian is unusable, or the result is worse than rounding to nearest.
    """
    W = torch.cat(list(weights.values()))  # [rows of all, in]
    width = W.shape[1]
    size = width if settings.group_size == -1 else settings.group_size
    natural = torch.arange(width, device=W.device)
    hessian = damped(H, settings.damp, act_order(H) if settings.act_order else natural)
    if C is not None:
        W = drifted_target(W, C, hessian, settings.drift)
    grid = search_grid(
        W, hessian.H.diagonal(), settings.bits, size, sym=settings.sym, search=settings.scale_search
    )
    rounded = gptq(W, hessian.U, grid, hessian.order)
    if settings.refine:
        grid, rounded = _refine(W, rounded.integers, grid, hessian)
    return _split(weights, W, rounded, grid, hessian, settings)


def _refine(W: Tensor, integers: Tensor, grid: Grid, hessian: Damped) -> tuple[Grid, Rounded]:
    grid = refit_scales(W, integers, grid, hessian.H)
    integers = descend(W, integers, grid, hessian.H, hessian.order)
    grid = refit_scales(W, integers, grid, hessian.H)
    return grid, Rounded(integers, output_error(W, grid.values(integers), hessian.H))


def _split(
    weights: dict[str, Tensor], W: Tensor, rounded: Rounded, grid: Grid, hessian: Damped, settings: Settings
) -> dict[str, QuantisedLinear]:
    """One result per linear, each held against round-to-nearest."""
    results, start = {}, 0
    for name, weight in weights.items():
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        part = Grid(grid.bits, grid.group_size, grid.scales[rows], grid.zeros[rows])
        of_part = Rounded(rounded.integers[rows], rounded.errors[rows])
        stats = _stats(W[rows], of_part, part, hessian, sym=settings.sym)
        if not stats.error <= stats.rtn_error + SLACK:  # also when it is NaN
            raise QuantisationError(
                f"GPTQ's error {stats.error:.3g} is above round-to-nearest's {stats.rtn_error:.3g}",
                where=name,
                hint="this is a defect, or calibration text that says too little: try more of it",
            )
        results[name] = QuantisedLinear(of_part.integers, part, stats)
    return results


def _stats(W: Tensor, rounded: Rounded, grid: Grid, hessian: Damped, *, sym: bool) -> ModuleStats:
    """Errors of one linear over all of its rows.

    GPTQ's is what the solver summed up on its way, corrected by what the integers that it returned cost on
    MEASURED_ROWS rows, so that wrong integers show. These rows also stand for the energy.
    """
    H, rows = hessian.H, W.shape[0]
    some = slice(None, None, math.ceil(rows / MEASURED_ROWS))
    Q = Grid(grid.bits, grid.group_size, grid.scales[some], grid.zeros[some]).values(rounded.integers[some])
    gap = output_error(W[some], Q, H) - rounded.errors[some]
    error = float(rounded.errors.sum() + gap.mean() * rows)
    energy = float(output_error(W[some], torch.zeros_like(Q), H).mean() * rows) or 1.0
    plain = search_grid(W, H.diagonal(), grid.bits, grid.group_size, sym=sym, search="none")
    rtn_error = float(output_error(W, plain.values(plain.integers(W)), H).sum())
    return ModuleStats(error / energy, rtn_error / energy, hessian.damp, hessian.dead)
