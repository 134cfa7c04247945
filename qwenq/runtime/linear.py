"""Multiply plain weights, and join layers over the same input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qwenq.compute import dense
from qwenq.runtime.kernels.base import Linear

_BLOCK, _LEAST_BLOCK, _FEW_ROWS = 256, 64, 32
"""Outputs of a block, at most and at least, and the most rows for which blocks are faster."""


class Dense:
    """A matrix in the dtype of the activations.

    It lies in oneDNN's blocks from the start where that is faster (``dense.packable``).

    Args:
        weight: [out, in].
        bias: [out] or None.
        shared: whether ``weight`` is held elsewhere, too. It stays as it is then, or there would be a second
            copy of it; on the CPU in float32, few rows are multiplied with some of its outputs at a time.
    """

    name = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> None:
        self.bias = bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self._packed = not shared and dense.packable(weight)
        self._weight = dense.pack(weight) if self._packed else weight
        self._blocks = _blocks(weight) if shared and bias is None else None

    @property
    def weight(self) -> Tensor:
        """[out, in]; a copy where it is packed."""
        return self._weight.to_dense() if self._packed else self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        if self._packed:
            return dense.multiply_packed(x, self._weight, self.bias)
        if self._blocks is not None and x.shape[:-1].numel() <= _FEW_ROWS:
            return _linear_by_blocks(x, self._blocks)
        return dense.multiply(x, self._weight, self.bias)


class SideBySide:
    """Layers over the same input that cannot be one, as their columns are ordered differently."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts, self.name = parts, " + ".join(dict.fromkeys(part.name for part in parts))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of all parts, one after the other."""
        return torch.cat([part(x) for part in self.parts], dim=-1)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def float32_logits(head: Linear, hidden: Tensor) -> Tensor:
    """Return the output head's product in float32, for softmax and sampling."""
    return head(hidden).to(torch.float32)


def _blocks(weight: Tensor) -> Tensor | None:
    """View the matrix as [blocks, outputs of a block, in]; None where that is no faster."""
    outputs = math.gcd(len(weight), _BLOCK)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or outputs < _LEAST_BLOCK:
        return None
    return weight.view(-1, outputs, weight.shape[1])


def _linear_by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply by the matrix of each block: it stays in the processor's cache while it is used."""
    count, outputs, width = blocks.shape
    rows = x.reshape(-1, width)  # [rows, in]
    if len(rows) == 1:
        found = torch.bmm(blocks, rows.view(1, width, 1).expand(count, -1, -1))  # [blocks, outputs, 1]
    else:
        found = torch.bmm(rows.expand(count, -1, -1), blocks.transpose(1, 2))  # [blocks, rows, outputs]
        found = found.transpose(0, 1)
    return found.reshape(*x.shape[:-1], count * outputs)
