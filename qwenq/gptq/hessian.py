"""Accumulate the Hessian of a linear layer's quantisation error."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.gptq.exact import mean_products
from qwenq.gptq.running import running_hessian


def hessian(inputs: Sequence[Tensor], team: Team = ALONE) -> Tensor:
    """Return H, [width, width] float32, symmetric; computed in float32 whatever dtype the activations have.

    Args:
        inputs: this rank's activations by batch, [..., width] each; every rank has a batch.
        team: the ranks that share the batches; each gets the same H, whatever their number.

    Raises:
        ValueError: there are no tokens.
    """
    if not team.launched:
        return running_hessian(inputs)
    width, device = inputs[0].shape[-1], inputs[0].device

    def columns(batch: int, some: slice) -> Tensor:
        return inputs[batch].reshape(-1, width)[:, some].float()  # [tokens, these columns]

    tokens = [x.numel() // width for x in inputs]
    found = mean_products(columns, columns, tokens, (width, width), device, same=True, team=team)
    if found is None:
        raise ValueError("a Hessian of no tokens")
    return found
