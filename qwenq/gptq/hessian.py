"""The Hessian of a linear layer's quantisation error, H = 2/n · Σ x xᵀ (GPTQ, arXiv 2210.17323, §3.1).

For one output row w of a layer, replacing w by q costs ‖(w − q) X‖² = ½ n (w − q) H (w − q)ᵀ, so H is shared
by all rows and by all layers that read the same input (q/k/v; gate/up).
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = (
    512  # columns a product covers: wide enough for full GEMM speed, narrow enough to skip the upper triangle
)


class Hessian:
    """Accumulates H as a running mean over tokens, in float32 whatever dtype the activations have.

    Attributes:
        tokens: number of tokens seen.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add activations.

        Args:
            x: [..., width], any float dtype.
        """
        x = x.reshape(-1, x.shape[-1]).float()  # [tokens, width]
        new = x.shape[0]
        keep = self.tokens / (self.tokens + new)
        weight = 2.0 / (self.tokens + new)
        for start in range(0, x.shape[1], PANEL):  # lower triangle only: H is symmetric
            panel = x[:, start : start + PANEL]
            self._sum[start:, start : start + PANEL].addmm_(x[:, start:].T, panel, beta=keep, alpha=weight)
        self.tokens += new

    def matrix(self) -> Tensor:
        """H, [width, width] float32, symmetric: the accumulator itself, mirrored in place."""
        for start in range(0, self._sum.shape[0], PANEL):
            stop = min(start + PANEL, self._sum.shape[0])
            square = self._sum[start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).T)
            self._sum[start:stop, stop:] = self._sum[stop:, start:stop].T
        return self._sum
