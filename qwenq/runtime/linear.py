"""Linear layers over plain weights, and what joins layers; those over packed integers are in ``kernels``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from qwenq.runtime.kernels.base import Kernel


class Dense:
    """A matrix in the dtype of the activations.

    Args:
        weight: [out, in].
        bias: [out] or None.
    """

    name = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


class SideBySide:
    """Layers over the same input that cannot be one, as their columns are ordered differently."""

    def __init__(self, parts: Sequence[Kernel]) -> None:
        self.parts, self.name = parts, " + ".join(dict.fromkeys(part.name for part in parts))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], the outputs one after the other."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def float32_logits(head: Kernel, hidden: Tensor) -> Tensor:
    """The output head's product, as float32 for softmax and sampling."""
    return head(hidden).to(torch.float32)
