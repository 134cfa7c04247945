"""The same sums as ``exact``, as a process that works alone takes them: float32, batch after batch.

Faster there: nothing is rounded to units or counted in float64. But the last bits depend on the order of the
batches, so several processes cannot share this work and find the same integers. They, and a process that
torchrun started alone, take ``exact``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PANEL = (
    512  # columns a product covers: wide enough for full GEMM speed, narrow enough to skip the upper triangle
)


def running_hessian(inputs: Sequence[Tensor], width: int, device: torch.device | str) -> Tensor:
    """2/n · Σ x xᵀ, [width, width] float32, symmetric, as a running mean over batches.

    Args:
        inputs: [..., width] each, any float dtype.
        width: of the input.
        device: of the result.
    """
    H = torch.zeros(width, width, dtype=torch.float32, device=device)
    tokens = 0
    for batch in inputs:
        x = batch.reshape(-1, width).float()  # [tokens, width]
        total = tokens + x.shape[0]
        keep, weight = tokens / total, 2.0 / total
        for start in range(0, width, PANEL):  # lower triangle only
            panel = x[:, start : start + PANEL]
            H[start:, start : start + PANEL].addmm_(x[:, start:].T, panel, beta=keep, alpha=weight)
        tokens = total
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        square = H[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        H[start:stop, stop:] = H[stop:, start:stop].T
    return H


def running_drift(
    inputs: Sequence[Tensor], references: Sequence[Tensor], width: int, device: torch.device | str
) -> Tensor | None:
    """2/n · Σ (x̃ − x) xᵀ, [width, width] float32; None: there is no reference.

    In float32 whatever the activations' dtype: products in bfloat16 would be right to three digits, but H⁻¹
    enlarges what is wrong with them.

    Args:
        inputs: [..., width] each, as the quantised layers so far produce them.
        references: of the first of these batches, the same tokens in the original model.
        width: of the input.
        device: of the result.
    """
    C = torch.zeros(width, width, dtype=torch.float32, device=device)
    tokens = 0
    for given, original in zip(inputs, references, strict=False):
        x = given.reshape(-1, width).float()  # [tokens, width]
        drifted = original.reshape(-1, width).float() - x
        total = tokens + x.shape[0]
        C.addmm_(drifted.T, x, beta=tokens / total, alpha=2.0 / total)
        tokens = total
    return C if tokens else None
