"""Aiming at what the full-precision model computes, not at what the quantised model's inputs would give.

By the time a layer is quantised its input x has drifted from the input x̃ that it has in the original model.
GPTQ keeps Q x near W x; what is wanted is W x̃ (asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos,
arXiv 2505.11695). Completing the square in ‖Q X − W X̃‖² leaves GPTQ's own problem with another target:

    W′ = W + W C H⁻¹,   C = 2/n · Σ (x̃ − x) xᵀ

so nothing in the solver changes. ``strength`` scales the correction: C is an estimate from finite text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.gptq.damping import Damped
from qwenq.gptq.exact import mean_products
from qwenq.gptq.running import running_drift


def drift(
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    width: int,
    device: torch.device | str,
    team: Team = ALONE,
) -> Tensor | None:
    """C, [width, width] float32, not symmetric; None: no rank has a reference.

    Products of a batch are computed in bfloat16 where the activations are: C is a small correction, estimated
    from few tokens, and float32 would take a third of a layer's time.

    Args:
        inputs: this rank's activations by batch, [..., width] each, as the quantised layers so far produce
            them.
        references: of the first of these batches (all, or none), the same tokens in the original model.
        width: of the input.
        device: of C.
        team: whose batches these are.
    """

    if not team.launched:
        return running_drift(inputs, references, width, device)

    def drifted(batch: int, some: slice) -> Tensor:
        return _columns(references[batch], some) - _columns(inputs[batch], some)

    def given(batch: int, some: slice) -> Tensor:
        x = inputs[batch].reshape(-1, width)[:, some]
        return x if x.dtype is torch.bfloat16 else x.float()

    tokens = [x.numel() // width for x in references]
    return mean_products(drifted, given, tokens, (width, width), device, team=team)


def _columns(x: Tensor, some: slice) -> Tensor:
    return x.reshape(-1, x.shape[-1])[:, some].float()  # [tokens, these columns]


def times_inverse(M: Tensor, hessian: Damped) -> Tensor:
    """M H⁻¹, [any, in]: H⁻¹ = Uᵀ U in the order of U."""
    change = torch.empty_like(M)
    change[:, hessian.order] = (M[:, hessian.order] @ hessian.U.T) @ hessian.U
    return change


def cheaper_from_right(rows: int, width: int) -> bool:
    """Whether C H⁻¹ costs less than (W C) H⁻¹: 4 · in³ + 2 · rows · in² operations against 6 · rows · in²."""
    return rows > width


def drifted_target(
    W: Tensor, C: Tensor, hessian: Damped, strength: float, CH: Tensor | None = None
) -> Tensor:
    """W′, the weight whose outputs on the drifted inputs come nearest to the original outputs.

    Args:
        W: [rows, in] float32.
        C: [in, in] float32, from ``drift``.
        hessian: of the drifted inputs; its damping keeps the regression from following noise.
        strength: 0 (plain GPTQ) … 1 (the whole correction).
        CH: C H⁻¹, where that is known.
    """
    change = times_inverse(W @ C, hessian) if CH is None else W @ CH
    return W + change.mul_(strength)
