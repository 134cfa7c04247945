"""Linear layers over plain weights, and what joins layers; those over packed integers are in ``kernels``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from qwenq.runtime.bfloat16_products import float32_is_faster
from qwenq.runtime.kernels.base import Kernel

_PACKED_FOR = 32
"""Rows that oneDNN is told of when it packs; the layout is the same from 2 to 512, for 1 alone another."""
_MANY_ROWS = 384
"""From here on a packed bfloat16 matrix is unpacked where the CPU multiplies float32 faster."""
_BLOCK, _FEWEST, _FEW_ROWS = 256, 64, 32
"""Outputs of a block, at most and at least, and the most rows for which blocks are faster."""


class Dense:
    """A matrix in the dtype of the activations.

    Libraries copy a matrix into blocks as they multiply; with up to a few dozen rows that takes longer than
    the products. On CPUs with AVX-512 it lies in oneDNN's blocks from the start instead, in float32 and
    bfloat16; the result of a row then does not depend on how many others there are, either, but for many rows
    where the CPU multiplies float32 faster (``bfloat16_products``).

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
        self._packed = not shared and _packable(weight)
        self._weight = _pack(weight) if self._packed else weight
        self._blocks = _blocks(weight) if shared and bias is None else None

    @property
    def weight(self) -> Tensor:
        """[out, in]; a copy where it is packed."""
        return self._weight.to_dense() if self._packed else self._weight

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        if self._packed:
            return self._unpacked(x) if _unpacks(x) else _packed_linear(x, self._weight, self.bias)
        if self._blocks is not None and x.shape[:-1].numel() <= _FEW_ROWS:
            return _linear_by_blocks(x, self._blocks)
        return linear(x, self._weight, self.bias)

    def _unpacked(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear(x.float(), self.weight.float(), bias).to(x.dtype)


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


def _unpacks(x: Tensor) -> bool:
    many = x.dtype is torch.bfloat16 and x.shape[:-1].numel() >= _MANY_ROWS
    return many and float32_is_faster()


def _packable(weight: Tensor) -> bool:
    """Whether packing helps: measured with AVX-512, where oneDNN has code of its own for both dtypes."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _blocks(weight: Tensor) -> Tensor | None:
    """The same matrix seen as [blocks, outputs of a block, in]; None where that is no faster."""
    outputs = math.gcd(len(weight), _BLOCK)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or outputs < _FEWEST:
        return None
    return weight.view(-1, outputs, weight.shape[1])


def _linear_by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """[..., in] → [..., out]: matrices of a block each stay in the processor's cache while they are used."""
    count, outputs, width = blocks.shape
    rows = x.reshape(-1, width)  # [rows, in]
    if len(rows) == 1:
        found = torch.bmm(blocks, rows.view(1, width, 1).expand(count, -1, -1))  # [blocks, outputs, 1]
    else:
        found = torch.bmm(rows.expand(count, -1, -1), blocks.transpose(1, 2))  # [blocks, rows, outputs]
        found = found.transpose(0, 1)
    return found.reshape(*x.shape[:-1], count * outputs)
