"""Aiming at what the full-precision model computes, not at what the quantised model's inputs would give.

By the time a layer is quantised its input x has drifted from the input x̃ that it has in the original model.
GPTQ keeps Q x near W x; what is wanted is W x̃ (asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos,
arXiv 2505.11695). Completing the square in ‖Q X − W X̃‖² leaves GPTQ's own problem with another target:

    W′ = W + W C H⁻¹,   C = 2/n · Σ (x̃ − x) xᵀ

so nothing in the solver changes. ``strength`` scales the correction: C is an estimate from finite text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.gptq.damping import Damped


class Drift:
    """Accumulates C as a running mean over tokens, in float32 whatever dtype the activations have."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._mean = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, x: Tensor, reference: Tensor) -> None:
        """Add activations of the same tokens in both models.

        Args:
            x: [..., width], the input that the quantised layers before this one produce.
            reference: [..., width], the input in the original model.
        """
        x = x.reshape(-1, x.shape[-1]).float()  # [tokens, width]
        drift = reference.reshape(x.shape).float() - x
        new = x.shape[0]
        total = self.tokens + new
        self._mean.addmm_(drift.T, x, beta=self.tokens / total, alpha=2.0 / total)
        self.tokens = total

    def matrix(self) -> Tensor:
        """C, [width, width] float32; not symmetric."""
        return self._mean


def drifted_target(W: Tensor, C: Tensor, hessian: Damped, strength: float) -> Tensor:
    """W′, the weight whose outputs on the drifted inputs come nearest to the original outputs.

    Args:
        W: [rows, in] float32.
        C: [in, in] float32, from ``Drift``.
        hessian: of the drifted inputs; its damping keeps the regression from following noise.
        strength: 0 (plain GPTQ) … 1 (the whole correction).
    """
    order, U = hessian.order, hessian.U
    rows, width = W.shape
    # 6 · rows · in² operations from the left, 4 · in³ + 2 · rows · in² from the right.
    from_left = rows <= width
    change = _times_inverse((W @ C)[:, order], U) if from_left else W @ _times_inverse(C[:, order], U)
    target = W.clone()
    target[:, order] += change.mul_(strength)
    return target


def _times_inverse(M: Tensor, U: Tensor) -> Tensor:
    """M H⁻¹, [any, in], as H⁻¹ = Uᵀ U."""
    return (M @ U.T) @ U
