"""Quantise the linears that share an input."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.errors import QuantisationError
from qwenq.gptq.choices import Settings
from qwenq.gptq.drift import Deviation
from qwenq.gptq.grid import Grid
from qwenq.gptq.rows import solve_rows

MEASURED_ROWS = 256  # evenly spread output rows on which the solver's own figure is checked
SLACK = 1e-6  # of the output's energy: float32 cannot tell two errors apart that are nearer than this


@dataclass(frozen=True)
class ModuleStats:
    """What quantising one linear cost, as shares of its output's energy over the calibration tokens.

    Attributes:
        error: ‖(W′ − Q) X‖² / ‖W′ X‖², W′ the shifted target (``shift_targets``), X including the damping.
        rtn_error: the same for round-to-nearest on a min/max grid.
        damp: the share of the mean diagonal that was added to the Hessian.
        dead: input columns that were always zero.
        tokens: of an expert: how many were routed to it; None: not an expert, it sees all of them.
    """

    error: float
    rtn_error: float
    damp: float
    dead: int
    tokens: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are set, for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class QuantisedLinear:
    """The result for one linear: integers uint8 [out, in] on a grid, and what it cost."""

    integers: Tensor
    grid: Grid
    stats: ModuleStats


def quantise_group(
    weights: dict[str, Tensor],
    H: Tensor,
    deviation: Deviation | None,
    settings: Settings,
    team: Team = ALONE,
) -> dict[str, QuantisedLinear]:
    """Quantise linears that read the same input, as one matrix: rows do not influence each other.

    Args:
        weights: name → [out, in] float32; all with the same ``in``.
        H: [in, in] float32, their common Hessian; changed in place (damping).
        deviation: of their inputs from the original model's; None: there is none.
        settings: see ``Settings``.
        team: its ranks solve a share of the rows each, and all get the result.

    Raises:
        QuantisationError: the Hessian is unusable, or the result is worse than rounding to nearest.
    """
    W = torch.cat(list(weights.values()))  # [rows of all, in]
    measured = torch.cat([_measured(weight) for weight in weights.values()])
    size = W.shape[1] if settings.group_size == -1 else settings.group_size
    solved = solve_rows(W, measured, H, deviation, settings, size, team)
    damp, dead = solved.facts.tolist()
    results, start = {}, 0
    for name, weight in weights.items():
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        stats = _stats(solved.figures[rows], measured[rows], damp, int(dead))
        if not stats.error <= stats.rtn_error + SLACK:  # also when it is NaN
            raise QuantisationError(
                f"GPTQ's error {stats.error:.3g} is above round-to-nearest's {stats.rtn_error:.3g}",
                where=name,
                hint="this is a defect, or too little calibration text: try more of it",
            )
        grid = Grid(settings.bits, size, solved.scales[rows], solved.zeros[rows])
        results[name] = QuantisedLinear(solved.integers[rows], grid, stats)
    return results


def _measured(weight: Tensor) -> Tensor:
    """Return which rows' errors are computed a second time, from the integers: [rows] bool, evenly spread."""
    rows = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    rows[:: math.ceil(weight.shape[0] / MEASURED_ROWS)] = True
    return rows


def _stats(figures: Tensor, measured: Tensor, damp: float, dead: int) -> ModuleStats:
    """Return the errors of one linear over all of its rows.

    GPTQ's is what the solver summed up, corrected by what the integers that it returned cost on MEASURED_ROWS
    rows, so that wrong integers show. These rows also stand for the energy.
    """
    solver, rtn, cost, energy = figures.unbind(1)
    rows = figures.shape[0]
    gap = (cost - solver)[measured].mean()
    error = float(solver.sum() + gap * rows)
    whole = float(energy[measured].mean() * rows) or 1.0
    return ModuleStats(error / whole, float(rtn.sum()) / whole, damp, dead)
