"""Hessian and drift of an expert, which sees only the tokens that are routed to it.

An expert with fewer tokens than a quarter of its input width has a Hessian that says little about most
directions. It is drawn towards the Hessian of all tokens of the block:

    H = (n · H_own + κ · H_block) / (n + κ),   κ = width / 16

With no token of its own an expert is thus quantised for the block's tokens, and never rounded to nearest.
With n ≥ width / 4 it is its own Hessian alone. For ``down_proj`` the block's Hessian is that of the tokens
of the block as this expert's gate and up would hand them on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.distributed import Team
from qwenq.gptq.drift import Drift, InputDrift, OutputDrift, drift
from qwenq.gptq.hessian import hessian
from qwenq.models.routed_experts import Routed

PULL = 1 / 16  # κ as a share of the input width
ENOUGH = 1 / 4  # tokens as a share of the input width from which on an expert stands alone
SAMPLE = (
    2  # tokens of the block, as a multiple of the input width, that stand for all of them in ``down_proj``
)


@dataclass(frozen=True)
class ExpertInput:
    """What a group of an expert's linears is given.

    Attributes:
        inputs: this rank's activations by batch, [rows, in] each; some may have no row.
        routed: which tokens they are, by batch.
        references, reference_routed: the same of the original model; empty where drift is not asked for.
    """

    inputs: Sequence[Tensor]
    routed: Sequence[Routed]
    references: Sequence[Tensor]
    reference_routed: Sequence[Routed]


def expert_problem(
    given: ExpertInput, weights: Sequence[Tensor], pooled: Callable[[int], Tensor], team: Team
) -> tuple[Tensor, Drift | None, int]:
    """Return the Hessian, the drift and the number of tokens of an expert; all ranks get the same.

    Args:
        given: the input of the linears.
        weights: float32 [rows, in] of each linear.
        pooled: called with a step in tokens, where an expert has too few of its own: the Hessian over every
            such token of the block.
        team: whose batches these are.
    """
    width = weights[0].shape[1]
    both = [_shared_rows(given, batch) for batch in range(len(given.references))]
    pairs = [(given.inputs[at][mine], given.references[at][other]) for at, (mine, other) in enumerate(both)]
    counts = torch.tensor(
        [
            sum(len(x) for x in given.inputs),
            sum(len(x) for x, _ in pairs),
            sum(len(routed.hidden) for routed in given.routed),
        ],
        device=weights[0].device,
    )
    team.add(counts)
    own, paired, all_tokens = counts.tolist()
    pull = width * PULL if own < width * ENOUGH else 0.0
    H = torch.zeros(width, width, device=weights[0].device)
    if own:
        H = _hessian(given.inputs, team)
    if pull:
        step = max(1, all_tokens // (SAMPLE * width))
        H = H.mul_(own / (own + pull)).add_(pooled(step), alpha=pull / (own + pull))
    return H, _drift(pairs, weights, paired, own + pull, team), own


def _shared_rows(given: ExpertInput, batch: int) -> tuple[Tensor, Tensor]:
    """Return masks of a batch's rows, in both streams, that are the same tokens."""
    mine, other = given.routed[batch].rows, given.reference_routed[batch].rows
    return torch.isin(mine, other), torch.isin(other, mine)


def _drift(
    pairs: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
    paired: int,
    tokens: float,
    team: Team,
) -> Drift | None:
    """Return the drift over the tokens that both streams route to the expert, scaled to all of H's tokens."""
    if not paired:
        return None
    some = [pair for pair in pairs if len(pair[0]) or team.launched]
    inputs, references = [x for x, _ in some], [y for _, y in some]
    H = _hessian(inputs, team) if not team.launched else torch.empty(0)  # several processes need none
    found = drift(inputs, references, weights, H, team)
    share = paired / tokens
    if isinstance(found, InputDrift):
        return InputDrift(found.C * share)
    if isinstance(found, OutputDrift):
        return OutputDrift(found.WC * share)
    return found


def _hessian(inputs: Sequence[Tensor], team: Team) -> Tensor:
    """Return ``hessian``; batches without a row count only for how many batches several processes have."""
    return hessian(inputs if team.launched else [x for x in inputs if len(x)], team)
