"""An output head in Int8: the largest matrix of a small model, read whole for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.errors import UnsupportedError
from qwenq.runtime.kernels.base import Kernel
from qwenq.runtime.linear import Dense


class Int8Head:
    """Each row of the head rounded to nearest in 8 bits with a scale of its own. On the CPU, in bfloat16.

    Args:
        weight: [vocabulary, hidden].

    Raises:
        UnsupportedError: another device or dtype.
    """

    name = "int8 head"

    def __init__(self, weight: Tensor) -> None:
        if reason := self.why_not(weight.device, weight.dtype):
            raise UnsupportedError(
                f"the Int8 head cannot be used: {reason}", where="--head", hint="leave --head out"
            )
        largest = weight.abs().amax(dim=1).to(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
        # Rounded first, as the product multiplies by it in bfloat16.
        self._scales = (largest / 127).to(torch.bfloat16)
        self._integers = torch.empty(weight.shape, dtype=torch.int8)
        for start in range(0, len(weight), 4096):  # bounds the float32 temporary
            rows = slice(start, start + 4096)
            scaled = weight[rows].to(torch.float32) / self._scales[rows].to(torch.float32).unsqueeze(1)
            self._integers[rows] = scaled.round_().clamp_(-127, 127).to(torch.int8)
        self._multiply = torch.ops.aten._weight_int8pack_mm.default

    @classmethod
    def of(cls, head: Kernel) -> Int8Head:
        """A plain head in 8 bits.

        Raises:
            UnsupportedError: the head is quantised already, or this device or dtype cannot run one in Int8.
        """
        if not isinstance(head, Dense):
            raise UnsupportedError(
                f"the output head is quantised already ({head.name})",
                where="--head",
                hint="leave --head out",
            )
        return cls(head.weight)

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        """Why not, in words that follow "because"; None: it can."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., vocabulary]."""
        logits = self._multiply(x.reshape(-1, x.shape[-1]), self._integers, self._scales)
        return logits.view(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self._integers.nbytes + self._scales.nbytes
