"""Run a command of qwenq with another policy for the Hessians of experts.

Usage: ``python _expert_policy.py POLICY quantize MODEL …``. POLICY is a key of ``POLICIES``. An expert that
no token was routed to gets the block's Hessian under every policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qwenq.distributed import Team
from qwenq.gptq import pipeline
from qwenq.gptq.asymmetric import Deviation, measure_deviation
from qwenq.gptq.experts import SAMPLE, ExpertInput
from qwenq.gptq.hessian import hessian
from qwenq.models import transformers_model
from qwenq.models.transformers_model import Expert, Routed, RoutedExperts


@dataclass(frozen=True)
class Policy:
    """How H is made: (n · H_own + κ · H_block) / (n + κ).

    Attributes:
        pull: κ as a share of the input width; infinite: H_block alone.
        below: n as a share of the input width, from which on κ is 0.
        squared: whether each token counts by the square of its routing weight, their mean being one.
        deviation: whether the deviation from the original model's inputs shifts the target.
    """

    pull: float
    below: float
    squared: bool = False
    deviation: bool = True


ALWAYS = float("inf")
POLICIES = {
    "own": Policy(0, 0),
    "block": Policy(ALWAYS, ALWAYS),
    "pull_16_below_4": Policy(1 / 16, 1 / 4),
    "pull_16_below_2": Policy(1 / 16, 1 / 2),
    "pull_16": Policy(1 / 16, ALWAYS),
    "pull_4": Policy(1 / 4, ALWAYS),
    "squared": Policy(0, 0, squared=True),
    "squared_pull_16": Policy(1 / 16, ALWAYS, squared=True),
    "squared_pull_16_below_4": Policy(1 / 16, 1 / 4, squared=True),
    "own_no_deviation": Policy(0, 0, deviation=False),
    "pull_16_no_deviation": Policy(1 / 16, ALWAYS, deviation=False),
}


@dataclass(frozen=True)
class WeightedRows(Routed):
    """What an expert is given, with the router's weight of each of its tokens."""

    weights: Tensor


def run_expert(self: Expert, hidden: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return the outputs for ``hidden[rows]``; keep the weights for the measurement."""
    x = hidden[rows]
    self.routed = WeightedRows(hidden, rows, weights)
    inner = self._activation(self.gate_proj(x)) * self.up_proj(x)
    self.routed = WeightedRows(hidden, rows, weights)
    return self.down_proj(inner)  # type: ignore[no-any-return]


def run_experts(self: RoutedExperts, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Do as ``RoutedExperts.forward``, every expert called."""
    out = torch.zeros_like(hidden)
    for number, expert in enumerate(self):
        rows, place = torch.where(chosen == number)
        found = expert(hidden, rows, weights[rows, place]) * weights[rows, place, None]
        out.index_add_(0, rows, found.to(out.dtype))
    return out


def measure(
    policy: Policy,
    given: ExpertInput,
    weights: Sequence[Tensor],
    pooled: Callable[[int], Tensor],
    team: Team,
) -> tuple[Tensor, Deviation | None, int]:
    """Do as ``measure_expert``, in one process, under a policy."""
    width, n = weights[0].shape[1], sum(len(x) for x in given.inputs)
    pull = width * policy.pull if n < width * policy.below else 0.0
    step = max(1, sum(len(routed.hidden) for routed in given.routed) // (SAMPLE * width))
    scales = [_scale(policy, routed) for routed in given.routed]
    mean = sum(float(scale.square().sum()) for scale in scales) / n if n else 1.0
    scales = [scale / mean**0.5 for scale in scales]
    inputs = [x.float() * scale for x, scale in zip(given.inputs, scales, strict=True)]
    if n == 0 or pull == ALWAYS:
        H = pooled(step)
        H = H.clone()
    else:
        H = hessian([x for x in inputs if len(x)], team)
        if pull:
            H = H.mul_(n / (n + pull)).add_(pooled(step), alpha=pull / (n + pull))
    if not policy.deviation or n == 0 or pull == ALWAYS or not given.references:
        return H, None, n
    pairs = []
    for at, reference in enumerate(given.references):
        mine, other = given.routed[at].rows, given.reference_routed[at].rows
        some = torch.isin(mine, other)
        pairs.append((inputs[at][some], reference.float()[torch.isin(other, mine)] * scales[at][some]))
    paired = sum(len(x) for x, _ in pairs)
    pairs = [pair for pair in pairs if len(pair[0])]
    if not paired:
        return H, None, n
    shared = [x for x, _ in pairs]
    found = measure_deviation(shared, [y for _, y in pairs], weights, hessian(shared, team), team)
    return H, found and replace(found, products=found.products * (paired / (n + pull))), n


def _scale(policy: Policy, routed: Routed) -> Tensor:
    """Return what an expert's tokens are multiplied by, [tokens, 1]."""
    if not policy.squared:
        return torch.ones(len(routed.rows), 1)
    assert isinstance(routed, WeightedRows)
    return routed.weights.float()[:, None]


def main(name: str, argv: list[str]) -> None:
    """Put the policy in its place and run the command."""
    setattr(pipeline, "measure_expert", partial(measure, POLICIES[name]))  # noqa: B010
    if POLICIES[name].squared:
        setattr(transformers_model.Expert, "forward", run_expert)  # noqa: B010
        setattr(transformers_model.RoutedExperts, "forward", run_experts)  # noqa: B010
    from qwenq.cli import main as command

    sys.argv = ["qwenq", *argv]
    command()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
