"""Multiply dequantised weights, the reference: it runs everywhere, in the memory of plain weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from qwenq.models.packing import PackedLinear, dequantise
from qwenq.runtime.kernels.base import Requirements


class Dequantise:
    """A plain matrix product in the dtype of the activations."""

    name = "dequantise"
    device_type: ClassVar[str] = "any"
    widths: ClassVar[tuple[int, ...]] = (2, 4, 8)

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        weight = dequantise(packed, need.bits, need.checkpoint_format, need.dtype)
        self.weight = weight.to(need.device)
        self.bias = None if bias is None else bias.to(need.device, need.dtype)

    @staticmethod
    def unsupported_reason(need: Requirements) -> str | None:
        """Return None: it always can."""
        del need
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        return functional.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)
