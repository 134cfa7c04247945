"""Rows of a weight matrix through the algorithm: tiles of fixed size, each by itself, on whichever rank.

How a matrix is cut depends on its rows and on the kind of device, never on how many processes there are: the
last bits of a matrix product depend on its shape, and the same integers have to come out of any number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.gptq.damping import Damped, damped
from qwenq.gptq.drift import Drift, aim
from qwenq.gptq.grid import Grid
from qwenq.gptq.refine import refine
from qwenq.gptq.scales import ScaleSearch, search_grid
from qwenq.gptq.solver import act_order, gptq, output_error
from qwenq.models.packing import CheckpointFormat

TILE_ROWS = {"cpu": 2048}  # a column's update of a tile stays in the cache
TILE_ROWS_ELSEWHERE = 16384  # on a GPU the column loop costs what its launches cost: fewer, larger tiles


@dataclass(frozen=True)
class Settings:
    """What the algorithm can be told; the recipe holds the same names for users.

    Attributes:
        module_bits: (pattern, bits) of modules that differ from the rest; 16: they are not quantised.
    """

    bits: int
    group_size: int
    sym: bool
    act_order: bool
    scale_search: ScaleSearch
    damp: float
    drift: float
    refine: bool
    module_bits: tuple[tuple[str, int], ...] = ()

    def bits_of(self, module: str) -> int:
        """Return the bits of a module by its name in a block: the first pattern's that is found in it."""
        return next((bits for pattern, bits in self.module_bits if re.search(pattern, module)), self.bits)

    @property
    def checkpoint_format(self) -> CheckpointFormat:
        """Return how zero points are stored: free ones as they are, as GPTQModel refuses them minus one."""
        return "gptq" if self.sym else "gptq_v2"


@dataclass(frozen=True)
class SolvedRows:
    """Rows on their grid, and what they cost.

    Attributes:
        integers: [rows, in] uint8.
        scales, zeros: [rows, groups] float32.
        figures: [rows, 4] float32 a row's output error as the solver summed it up; of round-to-nearest on a
            min/max grid; and, on measured rows, as computed from the integers; the row's output energy.
        facts: [2] float64: the damping that was used, and the number of dead columns.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    figures: Tensor
    facts: Tensor

    @property
    def damp(self) -> float:
        """The share of the mean diagonal that was added to the Hessian."""
        return float(self.facts[0])

    @property
    def dead(self) -> int:
        """Columns whose input was always zero."""
        return int(self.facts[1])

    def of(self, rows: slice) -> SolvedRows:
        """Some of the rows: views."""
        parts = (self.integers[rows], self.scales[rows], self.zeros[rows], self.figures[rows])
        return SolvedRows(*parts, self.facts)

    def put(self, other: SolvedRows) -> None:
        """Take the values of as many rows."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


def tiles(rows: int, device: torch.device) -> list[slice]:
    """The rows of a matrix in equal parts (the last ones may be one row shorter)."""
    count = -(-rows // TILE_ROWS.get(device.type, TILE_ROWS_ELSEWHERE))
    edges = [rows * index // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def solve_rows(
    W: Tensor,
    measured: Tensor,
    H: Tensor,
    found: Drift | None,
    settings: Settings,
    group_size: int,
    team: Team = ALONE,
) -> SolvedRows:
    """Quantise a matrix; every rank gets all of it.

    The last ranks take the first tiles: the leader also writes. Whoever has a tile factorises the Hessian for
    himself, which costs no more time than waiting for it, and no traffic.

    Args:
        W: [rows, in] float32; this rank's rows of it are changed in place.
        measured: [rows] bool, see ``SolvedRows.figures``.
        H: [in, in] float32, see ``quantise_group``; changed in place.
        found: what is known of the drift of their inputs.
        settings: see ``Settings``.
        group_size: a divisor of ``in``.
        team: the ranks.

    Raises:
        QuantisationError: the Hessian is unusable.
    """
    parts = tiles(W.shape[0], W.device)
    owners = [team.world - 1 - index % team.world for index in range(len(parts))]
    result = _empty(W, group_size)
    mine = [part for part, owner in zip(parts, owners, strict=True) if owner == team.rank]
    if mine:
        natural = torch.arange(W.shape[1], device=W.device)
        hessian = damped(H, settings.damp, act_order(H) if settings.act_order else natural)
        if found is not None:
            aim(W, mine, found, hessian, settings.drift)
        for part in mine:
            result.of(part).put(_solve(W[part], measured[part], hessian, settings, group_size))
    for part, owner in zip(parts, owners, strict=True):
        for field in fields(result):
            team.copy(getattr(result.of(part), field.name), owner)
    return result


def _empty(W: Tensor, group_size: int) -> SolvedRows:
    rows, width = W.shape
    scales, zeros = (torch.empty(rows, width // group_size, device=W.device) for _ in range(2))
    integers = torch.empty(rows, width, dtype=torch.uint8, device=W.device)
    figures = torch.empty(rows, 4, device=W.device)
    facts = torch.empty(2, dtype=torch.float64, device=W.device)
    return SolvedRows(integers, scales, zeros, figures, facts)


def _solve(W: Tensor, measured: Tensor, hessian: Damped, settings: Settings, group_size: int) -> SolvedRows:
    """One tile: its grid, its integers, its figures."""
    H, bits, sym = hessian.H, settings.bits, settings.sym
    grid = search_grid(W, H.diagonal(), bits, group_size, sym=sym, search=settings.scale_search)
    rounded = gptq(W, hessian.U, grid, hessian.order)
    if settings.refine:
        grid, rounded = refine(W, rounded.integers, grid, H)
    figures = torch.zeros(W.shape[0], 4, device=W.device)
    figures[:, 0] = rounded.errors
    plain = search_grid(W, H.diagonal(), bits, group_size, sym=sym, search="none")
    figures[:, 1] = output_error(W, plain.values(plain.integers(W)), H)
    some = W[measured]
    of_some = Grid(bits, group_size, grid.scales[measured], grid.zeros[measured])
    figures[measured, 2] = output_error(some, of_some.values(rounded.integers[measured]), H)
    figures[measured, 3] = output_error(some, torch.zeros_like(some), H)
    facts = torch.tensor([hessian.damp, hessian.dead], dtype=torch.float64, device=W.device)
    return SolvedRows(rounded.integers, grid.scales, grid.zeros, figures, facts)
