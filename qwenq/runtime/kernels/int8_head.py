"""Round an output head to 8 bits: it is the largest matrix of a small model, read whole for every token."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.compute import cpu, linear
from qwenq.errors import UnsupportedError
from qwenq.runtime.kernels.base import Linear, UnpackedLinear
from qwenq.runtime.kernels.cpu_native import CpuNative
from qwenq.runtime.linear import Dense

_GROUP_SIZE = 32  # as in GGUF's Q8_0, the usual form of a head there
_VOCAB_AT_ONCE = 4096


class Int8Head:
    """The head rounded to nearest in 8 bits, a scale for each 32 columns. On the CPU, in bfloat16.

    Args:
        weight: bfloat16 [vocabulary, hidden].
    """

    name = f"int8 head by {CpuNative.name}"

    def __init__(self, weight: Tensor) -> None:
        self._vocab, hidden = weight.shape
        rows = -(-self._vocab // linear.OUTPUTS) * linear.OUTPUTS  # the product works on blocks of outputs
        integers = torch.full((rows, hidden), 128, dtype=torch.uint8)
        scales = torch.zeros(rows, hidden // _GROUP_SIZE)
        for start in range(0, self._vocab, _VOCAB_AT_ONCE):  # bounds the float32 temporary
            part = slice(start, min(start + _VOCAB_AT_ONCE, self._vocab))
            integers[part], scales[part] = _rounded(weight[part].float())
        layer = UnpackedLinear(integers, scales, torch.full(scales.shape, 128, dtype=torch.uint8), None)
        self._layer = CpuNative.of(layer, bits=8)

    @classmethod
    def of(cls, head: Linear) -> Int8Head:
        """Round a plain head.

        Raises:
            UnsupportedError: the head is quantised already, or it cannot run in Int8 here.
        """
        reason = f"the output head is quantised already ({head.name})"
        if isinstance(head, Dense):
            weight = head.weight
            if (unsupported := cls.unsupported_reason(weight)) is None:
                return cls(weight)
            reason = unsupported
        raise UnsupportedError(
            f"the Int8 head cannot be used: {reason}", where="--head", hint="leave --head out"
        )

    @staticmethod
    def unsupported_reason(weight: Tensor) -> str | None:
        """Return why such a head cannot run in Int8, in words that follow "because"; None: it can."""
        if weight.device.type != "cpu":
            return f"it runs on the CPU, not on {weight.device.type}"
        if weight.dtype != torch.bfloat16:
            return f"it computes in bfloat16, not in {str(weight.dtype).removeprefix('torch.')}"
        if reason := cpu.unsupported_reason():
            return reason
        if weight.shape[1] % _GROUP_SIZE:
            return f"{weight.shape[1]} columns are no multiple of {_GROUP_SIZE}"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., vocabulary] for [..., hidden]."""
        return self._layer(x)[..., : self._vocab]

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self._layer.nbytes


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round float32 [rows, hidden] to uint8 around 128, with float32 scales [rows, groups]."""
    groups = weight.view(len(weight), -1, _GROUP_SIZE)  # [rows, groups, group_size]
    largest = groups.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    # Rounded first, scales are what the integers are rounded against.
    scales = (largest / 127).to(torch.bfloat16).float()
    integers = (groups / scales.unsqueeze(-1)).round_().clamp_(-127, 127).add_(128)
    return integers.to(torch.uint8).view(weight.shape), scales
