"""Linear layers behind one small protocol: what multiplies is decided once, when the weights are loaded."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class Kernel(Protocol):
    """A linear layer that is ready to run."""

    name: str
    """What it is called in tables."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of ``x``."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that one product has to read: weights, scales, bias."""
        ...


class Dense:
    """A matrix in the dtype of the activations: plain weights, or quantised ones dequantised at load.

    Args:
        weight: [out, in].
        bias: [out] or None.
        name: ``dense``, or ``dequantise`` where the file held packed integers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, name: str = "dense") -> None:
        self.weight, self.bias, self.name = weight, bias, name

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def float32_logits(head: Kernel, hidden: Tensor) -> Tensor:
    """The output head's product, as float32 for softmax and sampling."""
    return head(hidden).to(torch.float32)
