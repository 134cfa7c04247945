"""Lower GPTQ's objective further by coordinate descent, with its result as the starting point.

    minimise over integers Z and scales s:   ½ tr((Q − W) H (Q − W)ᵀ),   Q = s · (Z − z), per row and group

Each group of columns is optimised in two steps that can only lower the objective: each of its integers moves
to the best value given all others (QuantEase, arXiv 2309.01885), then its scale is fitted to them. The change
of both is pushed onto the gradients of the other groups at once, as GPTQ's lazy blocks are: a sweep costs one
product with H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qwenq.compute.columns import Block, fit_scale, move_columns
from qwenq.compute.grid import Grid, Rounded

SWEEPS = 2  # each one gains less than the one before it
MOVED = 128  # columns of a wider group that are moved before the rest of the group's gradients are updated


def descend(
    W: Tensor, integers: Tensor, grid: Grid, H: Tensor, sweeps: int = SWEEPS, block: int = MOVED
) -> tuple[Grid, Rounded]:
    """Return better integers and scales; the zeros stay.

    Args:
        W: [rows, in] float32.
        integers: [rows, in] uint8, where to start.
        grid: where their scales start.
        H: [in, in].
        sweeps: over all groups.
        block: see ``MOVED``.
    """
    state = _State.of(W, integers, grid, H)
    for sweep in range(sweeps):
        for group in range(len(state.scales)):
            here = slice(group * grid.group_size, (group + 1) * grid.group_size)
            less = state.improve(group, here, grid.levels, block)
            # The last sweep reads no gradients of groups that it has passed.
            rest = slice(here.stop if sweep == sweeps - 1 else 0, None)
            state.G[rest].addmm_(H[rest, here], less, alpha=-1)
    improved = replace(grid, scales=state.scales.T.contiguous())
    return improved, Rounded(state.integers.T.contiguous(), state.errors)


@dataclass(frozen=True)
class _State:
    """The iterate; columns lie in rows, as in ``solver``."""

    H: Tensor  # [in, in]
    Q: Tensor  # [in, rows], the values
    G: Tensor  # [in, rows], the gradients H (Q − W)ᵀ
    integers: Tensor  # [in, rows] uint8
    scales: Tensor  # [groups, rows]
    zeros: Tensor  # [groups, rows]
    errors: Tensor  # [rows], as ``output_error`` has it

    @classmethod
    def of(cls, W: Tensor, integers: Tensor, grid: Grid, H: Tensor) -> _State:
        weights, transposed, *steps = (_transposed(x) for x in (W, integers, grid.scales, grid.zeros))
        scales, zeros = (x.to(W.dtype) for x in steps)
        grouped = transposed.to(W.dtype).unflatten(0, (-1, grid.group_size))  # [groups, group_size, rows]
        Q = grouped.sub_(zeros[:, None]).mul_(scales[:, None]).flatten(0, 1)
        D = weights.neg_().add_(Q)
        G = H @ D
        return cls(H, Q, G, transposed, scales, zeros, D.mul_(G).sum(0) / 2)

    def improve(self, group: int, here: slice, levels: int, block: int) -> Tensor:
        """Move a group's integers, fit its scale; return its old values less the new ones, [size, rows]."""
        size, Q = here.stop - here.start, self.Q[here]
        whole = Block(
            self.G[here], self.H[here, here], self.scales, self.zeros, [group] * size, levels,
            self.integers[here], torch.empty_like(Q),
        )  # fmt: skip
        self.errors.add_(_move_group(whole, Q, block))
        fitted = fit_scale(whole, Q, group)
        self.errors.add_(fitted.change)
        self.scales[group] = fitted.scale
        Q.copy_(fitted.values)
        return fitted.less


def _transposed(x: Tensor) -> Tensor:
    """Return a contiguous transpose that shares no memory, also where x has one row or column."""
    return x.T.clone(memory_format=torch.contiguous_format)


def _move_group(whole: Block, values: Tensor, block: int) -> Tensor:
    """Move all integers of a group and leave its gradients; return the change of ``output_error``, [rows]."""
    size = len(values)
    if size <= block:
        return move_columns(whole, values)
    gradient, change = whole.columns.clone(), torch.zeros_like(values[0])
    for start in range(0, size, block):
        part, after = slice(start, min(start + block, size)), slice(start + block, None)
        some = Block(
            gradient[part], whole.U[part, part], whole.scales, whole.zeros, whole.groups[part], whole.levels,
            whole.integers[part], whole.errors[part],
        )  # fmt: skip
        change += move_columns(some, values[part])
        gradient[after].addmm_(whole.U[after, part], whole.errors[part], alpha=-1)
    return change
