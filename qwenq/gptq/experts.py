"""Measure the Hessian and the deviation of an expert, which sees only the tokens that are routed to it.

Few tokens say little about most directions. So an expert's Hessian is drawn towards that of all tokens of the
block, the more the fewer its own are:

    H = (n · H_own + κ · H_block) / (n + κ),   κ = width / 4

An expert without any token is thus quantised for the block's tokens, and never rounded to nearest. For
``down_proj`` the block's Hessian is that of the block's tokens after this expert's gate and up. What κ is
worth on real activations: reports/benchmarks/quantize_moe.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwenq.distributed import Team
from qwenq.gptq.asymmetric import Deviation, measure_deviation
from qwenq.gptq.hessian import hessian
from qwenq.models.transformers_model import Routed

PULL = 1 / 4  # κ as a share of the input width
SAMPLE = (
    2  # tokens of the block, as a multiple of the input width, that stand for all of them in ``down_proj``
)


def measure_expert(
    inputs: Sequence[Tensor],
    routed: Sequence[Routed],
    references: Sequence[Tensor],
    reference_routed: Sequence[Routed],
    weights: Sequence[Tensor],
    pooled: Callable[[int], Tensor],
    team: Team,
) -> tuple[Tensor, Deviation | None, int]:
    """Return the Hessian, the deviation and the number of tokens of an expert; all ranks get the same.

    Args:
        inputs: this rank's activations by batch, [rows, in] each; some may have no row.
        routed: which tokens they are, by batch.
        references, reference_routed: the same of the original model; empty without asymmetric calibration.
        weights: float32 [rows, in] of each linear that reads them.
        pooled: called with a step in tokens: the Hessian over every such token of the block.
        team: the ranks that share the batches.
    """
    width = weights[0].shape[1]
    pairs = []  # tokens that both streams route to the expert
    for at, reference in enumerate(references):
        mine, other = routed[at].rows, reference_routed[at].rows
        pairs.append((inputs[at][torch.isin(mine, other)], reference[torch.isin(other, mine)]))
    counts = torch.tensor(
        [
            sum(len(x) for x in inputs),
            sum(len(x) for x, _ in pairs),
            sum(len(each.hidden) for each in routed),
        ],
        device=weights[0].device,
    )
    team.all_reduce_sum(counts)
    own, paired, all_tokens = counts.tolist()
    pull = width * PULL
    H = pooled(max(1, all_tokens // (SAMPLE * width))) * (pull / (own + pull))
    if own:
        H.add_(_hessian(inputs, team), alpha=own / (own + pull))
    deviation = _deviation(pairs, weights, paired / (own + pull), team) if paired else None
    return H, deviation, own


def _deviation(
    pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], share: float, team: Team
) -> Deviation | None:
    """Return the deviation over the tokens that both streams route to the expert, times their share."""
    some = [pair for pair in pairs if len(pair[0]) or team.launched]
    inputs, references = [x for x, _ in some], [y for _, y in some]
    H = _hessian(inputs, team) if not team.launched else torch.empty(0)  # several processes need none
    found = measure_deviation(inputs, references, weights, H, team)
    return found and replace(found, products=found.products * share)


def _hessian(inputs: Sequence[Tensor], team: Team) -> Tensor:
    """Return ``hessian``; batches without a row count only for how many batches several processes have."""
    return hessian(inputs if team.launched else [x for x in inputs if len(x)], team)
