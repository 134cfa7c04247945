"""Quantise the linears that share an input: Hessian in, integers, grids and statistics out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qwenq.compute.grid import Grid, round_to_nearest
from qwenq.distributed import ALONE, Team
from qwenq.errors import QuantisationError
from qwenq.gptq.asymmetric import Deviation, shift_targets
from qwenq.gptq.settings import Settings
from qwenq.gptq.solver import DampedHessian, damp_hessian, order_by_diagonal, output_error, solve

MEASURED_ROWS = 256  # evenly spread output rows on which the solver's own figure is checked
SLACK = 1e-6  # of the output's energy: float32 cannot tell two errors apart that are nearer than this


@dataclass(frozen=True)
class ModuleStats:
    """What quantising one linear cost, as shares of its output's energy over the calibration tokens."""

    # ‖(W′ − Q) X‖² / ‖W′ X‖², W′ the shifted target (``shift_targets``), X including the damping
    error: float
    rtn_error: float  # the same for round-to-nearest on a min/max grid
    damp: float  # the share of the mean diagonal that was added to the Hessian
    dead: int  # input columns that were always zero
    # of an expert: how many were routed to it; None: not an expert, it sees all of them
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


# Solve the rows of a matrix in tiles of fixed size, which ranks share out.
#
# How a matrix is cut depends on its rows and on the kind of device, never on how many processes there are:
# the last bits of a product depend on its shape, and every number of processes has to find the same
# integers.


TILE_ROWS = {"cpu": 2048}  # a column's update of a tile stays in the cache
TILE_ROWS_ELSEWHERE = 16384  # on a GPU the column loop costs what its launches cost: fewer, larger tiles


@dataclass(frozen=True)
class SolvedRows:
    """Rows on their grid, and what they cost."""

    integers: Tensor  # [rows, in] uint8
    scales: Tensor  # [rows, groups] float32
    zeros: Tensor  # [rows, groups] float32
    # [rows, 4] float32: a row's output error as the solver summed it up; that of round-to-nearest on a
    # min/max grid; and, on measured rows, as computed from the integers; the row's output energy
    figures: Tensor
    facts: Tensor  # [2] float64: the damping that was used, and the number of dead columns

    @classmethod
    def empty(cls, W: Tensor, group_size: int) -> SolvedRows:
        """Return memory for the rows of W."""
        rows, width = W.shape
        scales, zeros = (torch.empty(rows, width // group_size, device=W.device) for _ in range(2))
        integers = torch.empty(rows, width, dtype=torch.uint8, device=W.device)
        figures = torch.empty(rows, 4, device=W.device)
        return cls(integers, scales, zeros, figures, torch.empty(2, dtype=torch.float64, device=W.device))

    def view(self, rows: slice) -> list[Tensor]:
        """Return views of some of the rows, and of the facts."""
        return [self.integers[rows], self.scales[rows], self.zeros[rows], self.figures[rows], self.facts]


def tiles(rows: int, device: torch.device) -> list[slice]:
    """Return the rows of a matrix in equal parts (the last ones may be one row shorter)."""
    count = -(-rows // TILE_ROWS.get(device.type, TILE_ROWS_ELSEWHERE))
    edges = [rows * index // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def solve_rows(
    W: Tensor,
    measured: Tensor,
    H: Tensor,
    deviation: Deviation | None,
    settings: Settings,
    group_size: int,
    team: Team = ALONE,
) -> SolvedRows:
    """Quantise a matrix; every rank gets all of it.

    The last ranks take the first tiles: rank 0 also writes. Each rank that has a tile factorises the Hessian
    itself, which costs no more time than waiting for it, and no traffic.

    Args:
        W: [rows, in] float32; this rank's rows of it are changed in place.
        measured: [rows] bool, see ``SolvedRows.figures``.
        H, deviation, settings, team: see ``quantise_group``.
        group_size: a divisor of ``in``.
    """
    parts = tiles(W.shape[0], W.device)
    owners = [team.world - 1 - index % team.world for index in range(len(parts))]
    result = SolvedRows.empty(W, group_size)
    mine = [part for part, owner in zip(parts, owners, strict=True) if owner == team.rank]
    if mine:
        natural = torch.arange(W.shape[1], device=W.device)
        hessian = damp_hessian(H, settings.damp, order_by_diagonal(H) if settings.act_order else natural)
        if deviation is not None:
            shift_targets(W, mine, deviation, hessian, settings.asymmetric_calibration)
        for part in mine:
            solved = _solve_tile(W[part], measured[part], hessian, settings, group_size)
            for field, view in zip(fields(solved), result.view(part), strict=True):
                view.copy_(getattr(solved, field.name))
    for part, owner in zip(parts, owners, strict=True):
        for view in result.view(part):
            team.broadcast(view, owner)
    return result


def _solve_tile(
    W: Tensor, measured: Tensor, hessian: DampedHessian, settings: Settings, group_size: int
) -> SolvedRows:
    """Solve one tile and compute its figures."""
    H, bits, sym = hessian.H, settings.bits, settings.sym
    grid, rounded = solve(
        W, hessian, bits, group_size, sym=sym, scale_search=settings.scale_search,
        coordinate_descent=settings.coordinate_descent,
    )  # fmt: skip
    figures = torch.zeros(W.shape[0], 4, device=W.device)
    figures[:, 0] = rounded.errors
    figures[:, 1] = output_error(W, round_to_nearest(W, bits, group_size, sym=sym), H)
    some = W[measured]
    of_some = Grid(bits, group_size, grid.scales[measured], grid.zeros[measured])
    figures[measured, 2] = output_error(some, of_some.values(rounded.integers[measured]), H)
    figures[measured, 3] = output_error(some, torch.zeros_like(some), H)
    facts = torch.tensor([hessian.damp, hessian.dead], dtype=torch.float64, device=W.device)
    return SolvedRows(rounded.integers, grid.scales, grid.zeros, figures, facts)
