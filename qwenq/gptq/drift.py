"""Aiming at what the full-precision model computes, not at what the quantised model's inputs would give.

By the time a layer is quantised its input x has drifted from the input x̃ that it has in the original model.
GPTQ keeps Q x near W x; what is wanted is W x̃ (asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos,
arXiv 2505.11695). Completing the square in ‖Q X − W X̃‖² leaves GPTQ's own problem with another target:

    W′ = W + W C H⁻¹,   C = 2/n · Σ (x̃ − x) xᵀ

so nothing in the solver changes. ``strength`` scales the correction: C is an estimate from finite text.

A weight with fewer rows than columns is better served by W C = 2/n · Σ W (x̃ − x) xᵀ: [rows, in] instead of
[in, in] is summed and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.gptq.damping import Damped
from qwenq.gptq.exact import mean_products
from qwenq.gptq.running import running_drift, running_output_drift
from qwenq.gptq.solver import panels


class Drift(Protocol):
    """What is known of the drift, by the time the Hessian has been factorised."""

    def corrections(self, W: Tensor, parts: Sequence[slice], hessian: Damped) -> Iterator[Tensor]:
        """W C H⁻¹ for these runs of the rows of W, [rows of the run, in] each, one after the other."""


@dataclass(frozen=True)
class InputDrift:
    """C, [in, in] float32, not symmetric."""

    C: Tensor

    def corrections(self, W: Tensor, parts: Sequence[slice], hessian: Damped) -> Iterator[Tensor]:
        """C H⁻¹ costs 4 · in³ operations, and W C H⁻¹ with it 2 · rows · in²; (W C) H⁻¹ 6 · rows · in²."""
        if W.shape[0] > W.shape[1]:
            CH = times_inverse(self.C, hessian)
            yield from (W[part] @ CH for part in parts)
        else:
            yield from (times_inverse(W[part] @ self.C, hessian) for part in parts)


@dataclass(frozen=True)
class OutputDrift:
    """W C, [rows, in] float32."""

    WC: Tensor

    def corrections(self, W: Tensor, parts: Sequence[slice], hessian: Damped) -> Iterator[Tensor]:
        """Of W, the weight that ``WC`` was made with."""
        if W.shape != self.WC.shape:
            raise ValueError(f"the drift of {list(self.WC.shape)} outputs and inputs, not {list(W.shape)}")
        yield from (times_inverse(self.WC[part], hessian) for part in parts)


def drift(
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    weights: Sequence[Tensor],
    H: Tensor,
    team: Team = ALONE,
) -> Drift | None:
    """The drift of an input that some linears share; None: no rank has a reference.

    Args:
        inputs: this rank's activations by batch, [..., in] each, as the quantised layers so far produce them.
        references: of these batches, the same tokens in the original model; or none.
        weights: float32 [rows, in] of each linear, in the order in which they are quantised.
        H: [in, in] float32, ``hessian`` of the inputs, without damping.
        team: whose batches these are.
    """
    width, device = weights[0].shape[1], weights[0].device
    if team.launched:
        C = exact_drift(inputs, references, width, device, team)
    elif sum(weight.shape[0] for weight in weights) < width:
        WC = running_output_drift(inputs, references, torch.cat(list(weights)))
        return None if WC is None else OutputDrift(WC)
    else:
        C = running_drift(inputs, references, H)
    return None if C is None else InputDrift(C)


def exact_drift(
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    width: int,
    device: torch.device | str,
    team: Team,
) -> Tensor | None:
    """C, the same on every rank and for any number of them; see ``running_drift`` for a process alone.

    Products of a batch are computed in bfloat16 where the activations are: the drift to three digits, for a
    fraction of float32's time.
    """

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
    """M H⁻¹, [any, in]: H⁻¹ = Uᵀ U in the order of U, whose lower half, zeros, no product reads."""
    product, U = M.index_select(1, hessian.order), hessian.U
    for panel in panels(U.shape[0]):  # of M Uᵀ: of what is replaced, nothing to its right needs it
        product[:, panel] = product[:, panel.start :] @ U[panel, panel.start :].T
    for panel in reversed(panels(U.shape[0])):  # of that times U: nothing to its left does
        product[:, panel] = product[:, : panel.stop] @ U[: panel.stop, panel]
    return product.index_select(1, torch.argsort(hessian.order))


def aim(W: Tensor, parts: Sequence[slice], found: Drift, hessian: Damped, strength: float) -> None:
    """Change runs of rows of W to W′, whose outputs on the drifted inputs come nearest to the original ones.

    Args:
        W: [rows, in] float32.
        parts: the runs.
        found: of these rows' inputs.
        hessian: of the drifted inputs; its damping keeps the regression from following noise.
        strength: 0 (plain GPTQ) … 1 (the whole correction).
    """
    for part, correction in zip(parts, found.corrections(W, parts, hessian), strict=True):
        W[part].add_(correction, alpha=strength)
