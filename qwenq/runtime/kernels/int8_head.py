"""An output head in Int8: the largest matrix of a small model, read whole for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.errors import UnsupportedError
from qwenq.runtime.kernels.base import Grouped, Kernel
from qwenq.runtime.kernels.cpu_int4 import CpuInt8, block
from qwenq.runtime.kernels.cpu_native import CpuNative
from qwenq.runtime.linear import Dense

_GROUP_SIZE = 32  # as in GGUF's Q8_0, the usual form of a head there
_ROWS_AT_ONCE = 4096


class Int8Head:
    """The head rounded to nearest in 8 bits, a scale for each 32 columns. On the CPU, in bfloat16.

    Args:
        weight: bfloat16 [vocabulary, hidden].

    Attributes:
        name: says which product multiplies it, too.
    """

    def __init__(self, weight: Tensor) -> None:
        self._vocab, hidden = weight.shape
        rows = -(-self._vocab // block()) * block()  # the product works on blocks of outputs
        integers = torch.full((rows, hidden), 128, dtype=torch.uint8)
        scales = torch.zeros(rows, hidden // _GROUP_SIZE)
        for start in range(0, self._vocab, _ROWS_AT_ONCE):  # bounds the float32 temporary
            part = slice(start, min(start + _ROWS_AT_ONCE, self._vocab))
            integers[part], scales[part] = _rounded(weight[part].float())
        zeros = torch.full(scales.shape, 128, dtype=torch.uint8)
        layer = Grouped(integers, scales, zeros, None)
        self._layer = CpuInt8.of(layer, bits=8) if CpuNative.unable() else CpuNative.of(layer, bits=8)
        self.name = f"int8 head by {self._layer.name}"

    @classmethod
    def of(cls, head: Kernel) -> Int8Head:
        """A plain head in 8 bits.

        Raises:
            UnsupportedError: the head is quantised already, or it cannot run in Int8 here.
        """
        if not isinstance(head, Dense):
            raise _refused(f"the output head is quantised already ({head.name})")
        if reason := cls.why_not(head.weight):
            raise _refused(reason)
        return cls(head.weight)

    @staticmethod
    def why_not(weight: Tensor) -> str | None:
        """Why not, in words that follow "because"; None: it can."""
        if weight.device.type != "cpu":
            return f"it runs on the CPU, not on {weight.device.type}"
        if weight.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(weight.dtype).removeprefix('torch.')}"
        if block() == 0:
            return f"this CPU has neither AVX-512 nor AVX2 ({torch.backends.cpu.get_cpu_capability()})"
        if weight.shape[1] % _GROUP_SIZE:
            return f"{weight.shape[1]} columns are no multiple of {_GROUP_SIZE}"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., vocabulary]."""
        return self._layer(x)[..., : self._vocab]

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self._layer.nbytes


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 [rows, hidden] to uint8 around 128 of the same shape, and float32 scales [rows, groups]."""
    groups = weight.view(len(weight), -1, _GROUP_SIZE)  # [rows, groups, group_size]
    largest = groups.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    # Scales are bfloat16 in torch's product: rounded first, they are what the integers are rounded against.
    scales = (largest / 127).to(torch.bfloat16).float()
    integers = (groups / scales.unsqueeze(-1)).round_().clamp_(-127, 127).add_(128)
    return integers.to(torch.uint8).view(weight.shape), scales


def _refused(reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"the Int8 head cannot be used: {reason}", where="--head", hint="leave --head out"
    )
