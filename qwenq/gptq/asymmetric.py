"""Calibrate asymmetrically: target the outputs of the full-precision model, not those of the drifted inputs.

By the time a layer is quantised its input x deviates from the input x̃ that it has in the original model.
GPTQ keeps Q x near W x; what is wanted is W x̃ (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Completing
the square in ‖Q X − W X̃‖² leaves GPTQ's own problem with another target:

    W′ = W + W C H⁻¹,   C = 2/n · Σ (x̃ − x) xᵀ

so nothing in the solver changes. ``strength`` scales the shift: C is an estimate from finite text.

A weight with fewer rows than columns is better served by W C = 2/n · Σ W (x̃ − x) xᵀ: [rows, in] instead of
[in, in] is summed and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.gptq.hessian import exact_deviation, running_deviation, running_output_deviation
from qwenq.gptq.solver import DampedHessian, panels


@dataclass(frozen=True)
class Deviation:
    """How the inputs of some linears deviate from those of the original model."""

    products: Tensor  # C, [in, in] float32, not symmetric; or W C, [rows, in]
    times_weight: bool  # whether it is W C

    def target_shifts(self, W: Tensor, parts: Sequence[slice], hessian: DampedHessian) -> Iterator[Tensor]:
        """Yield W C H⁻¹ for these runs of the rows of W, [rows of the run, in] each.

        C H⁻¹ costs 4 · in³ operations, and W C H⁻¹ with it 2 · rows · in²; (W C) H⁻¹ costs 6 · rows · in².
        """
        if self.times_weight:
            if W.shape != self.products.shape:
                raise ValueError(f"W C is {list(self.products.shape)}, and W {list(W.shape)}")
            yield from (times_inverse(self.products[part], hessian) for part in parts)
        elif W.shape[0] > W.shape[1]:
            CH = times_inverse(self.products, hessian)
            yield from (W[part] @ CH for part in parts)
        else:
            yield from (times_inverse(W[part] @ self.products, hessian) for part in parts)


def measure_deviation(
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    weights: Sequence[Tensor],
    H: Tensor,
    team: Team = ALONE,
) -> Deviation | None:
    """Return the deviation of an input that some linears share; None: no rank has a reference.

    Args:
        inputs: this rank's activations by batch, [..., in] each, as the quantised layers so far produce them.
        references: of these batches, the same tokens in the original model; or empty.
        weights: float32 [rows, in] of each linear, in the order in which they are quantised.
        H: [in, in] float32, ``hessian`` of the inputs, without damping.
        team: the ranks that share the batches.
    """
    width, device = weights[0].shape[1], weights[0].device
    of_outputs = not team.launched and sum(weight.shape[0] for weight in weights) < width
    if team.launched:
        products = exact_deviation(inputs, references, width, device, team)
    elif of_outputs:
        products = running_output_deviation(inputs, references, torch.cat(list(weights)))
    else:
        products = running_deviation(inputs, references, H)
    return None if products is None else Deviation(products, of_outputs)


def shift_targets(
    W: Tensor, parts: Sequence[slice], deviation: Deviation, hessian: DampedHessian, strength: float
) -> None:
    """Change runs of rows of W to W′, whose outputs on the drifted inputs come nearest to the original ones.

    Args:
        W: [rows, in] float32.
        hessian: of the drifted inputs; its damping keeps the regression from following noise.
        strength: 0 (plain GPTQ) … 1 (the whole shift).
    """
    for part, shift in zip(parts, deviation.target_shifts(W, parts, hessian), strict=True):
        W[part].add_(shift, alpha=strength)


def times_inverse(M: Tensor, hessian: DampedHessian) -> Tensor:
    """Return M H⁻¹, [any, in]: H⁻¹ = Uᵀ U in the order of U, whose lower half, zeros, no product reads."""
    product, U = M.index_select(1, hessian.order), hessian.U
    for panel in panels(U.shape[0]):  # of M Uᵀ: of what is replaced, nothing to its right needs it
        product[:, panel] = product[:, panel.start :] @ U[panel, panel.start :].T
    for panel in reversed(panels(U.shape[0])):  # of that times U: nothing to its left does
        product[:, panel] = product[:, : panel.stop] @ U[: panel.stop, panel]
    return product.index_select(1, torch.argsort(hessian.order))
