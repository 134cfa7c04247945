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
    192  # columns a product covers: wide enough for GEMM's speed, narrow enough to skip the upper triangle
)


def running_hessian(inputs: Sequence[Tensor], width: int, device: torch.device | str) -> Tensor:
    """2/n · Σ x xᵀ, [width, width] float32, symmetric, as a running mean over batches.

    Args:
        inputs: [..., width] each, any float dtype.
        width: of the input.
        device: of the result.
    """
    H = torch.zeros(width, width, dtype=torch.float32, device=device)
    room = _room(inputs, width, device)
    tokens = 0
    for batch in inputs:
        x = _float32(batch, room)
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
    room, other = _room(inputs, width, device), _room(references, width, device)
    tokens = 0
    for given, original in zip(inputs, references, strict=False):
        x = _float32(given, room)
        drifted = _float32(original, other).sub_(x)
        total = tokens + x.shape[0]
        C.addmm_(drifted.T, x, beta=tokens / total, alpha=2.0 / total)
        tokens = total
    return C if tokens else None


def running_output_drift(inputs: Sequence[Tensor], references: Sequence[Tensor], W: Tensor) -> Tensor | None:
    """2/n · Σ W (x̃ − x) xᵀ, [rows, width] float32; None: there is no reference.

    W (x̃ − x) is computed in the activations' dtype and only its product with x in float32: a token's drift
    that is rounded before it meets its x leaves the sum in the span of the inputs, where H⁻¹ does not enlarge
    it.

    Args:
        inputs, references: as for ``running_drift``.
        W: [rows, width] float32.
    """
    rows, width = W.shape
    WC = torch.zeros(rows, width, dtype=torch.float32, device=W.device)
    room, other = _room(inputs, width, W.device), _room(references, width, W.device)
    outputs = _room(references, rows, W.device, of=width)
    tokens = 0
    for given, original in zip(inputs, references, strict=False):
        x = _float32(given, room)
        drifted = _float32(original, other).sub_(x).to(given.dtype)
        missed = _float32(drifted @ W.T.to(given.dtype), outputs)  # [tokens, rows]
        total = tokens + x.shape[0]
        WC.addmm_(missed.T, x, beta=tokens / total, alpha=2.0 / total)
        tokens = total
    return WC if tokens else None


def _room(batches: Sequence[Tensor], width: int, device: torch.device | str, of: int | None = None) -> Tensor:
    """Space for the largest batch in float32, [tokens, width]: allocated once, as new pages cost time.

    ``of``: the width of the batches, where it is another.
    """
    tokens = max((batch.numel() // (of or width) for batch in batches), default=0)
    return torch.empty(tokens, width, dtype=torch.float32, device=device)


def _float32(batch: Tensor, room: Tensor) -> Tensor:
    """A batch [..., width] as float32 [tokens, width], in ``room``."""
    tokens = batch.reshape(-1, room.shape[1])
    return room[: tokens.shape[0]].copy_(tokens)
