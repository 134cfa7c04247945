"""Define linear layers for the engines, and multiply those that are not quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qwenq.compute import dense
from qwenq.compute.linear import PackedWeights, plain
from qwenq.errors import UnsupportedError
from qwenq.models.gptq_config import CheckpointFormat
from qwenq.models.gptq_format import PackedLinear, has_trivial_g_idx, unpack

# A `QuantLinear` is a class: ``unsupported_reason(need)`` answers for a whole model, its constructor takes
# one layer as it lies in the file and keeps it in the layout that it reads fastest. New ones are listed in
# ``quantised_linear.KERNELS``.


class Linear(Protocol):
    """A linear layer that is ready to run."""

    name: str  # in tables

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in], in the dtype of ``x``."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that one product has to read: weights, scales, bias."""
        ...


@dataclass(frozen=True)
class LinearShape:
    """Sizes of one quantised linear, by headers and ``g_idx``."""

    name: str  # of the module
    in_features: int
    out_features: int
    even: bool = True  # whether the group size divides the columns


@dataclass(frozen=True, eq=False)
class Requirements:
    """What a model requires of a `QuantLinear`; equal to itself alone: experts are thousands of layers."""

    bits: int  # one of SUPPORTED_BITS
    group_size: int  # input columns that share a scale; -1 for all of them
    checkpoint_format: CheckpointFormat  # how zero points are stored
    device: torch.device
    dtype: torch.dtype  # of the activations
    layers: tuple[LinearShape, ...] = ()  # every quantised linear of the model


class QuantLinear(Linear, Protocol):
    """A linear layer over packed integers."""

    device_type: ClassVar[str]  # ``cpu``, ``cuda``, or ``any``: where it may be a faster choice than others
    widths: ClassVar[tuple[int, ...]]  # bits that it holds

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        """Take one linear layer; ``packed`` and ``bias`` lie on the CPU, what is kept on ``need.device``."""

    @staticmethod
    def unsupported_reason(need: Requirements) -> str | None:
        """Return why it cannot run such a model here, in words that follow "because"; None: it can."""
        ...


@dataclass(frozen=True)
class UnpackedLinear:
    """One quantised linear as plain integers, the columns of each group side by side."""

    integers: Tensor  # uint8 [out, in]
    scales: Tensor  # float32 [out, groups], of either sign
    zeros: Tensor  # uint8 [out, groups]
    order: Tensor | None  # int64 [in], the input column of each stored one; None: as they come

    @property
    def group_size(self) -> int:
        """Columns of each group."""
        return self.integers.shape[1] // self.scales.shape[1]

    def offsets(self, middle: int) -> Tensor | None:
        """Return what a product around ``middle`` leaves out, ``scale · (middle - zero)``, [out, groups].

        None where every zero point is the middle, as in a symmetric model.
        """
        shift = middle - self.zeros.to(torch.float32)
        return self.scales * shift if bool(shift.any()) else None


def unpack_by_group(packed: PackedLinear, need: Requirements) -> UnpackedLinear:
    """Unpack a layer; columns in activation order are sorted by group, which all have to have one size."""
    integers, scales, zeros = unpack(packed, need.bits, need.checkpoint_format)
    order = None
    if not has_trivial_g_idx(packed.g_idx, packed.groups):
        counts = torch.bincount(packed.g_idx, minlength=packed.groups)
        if not bool((counts == counts[0]).all()):
            raise UnsupportedError(
                "groups that g_idx makes differ in size, which this kernel has no layout for",
                hint="use --kernel dequantise",
            )
        order = torch.sort(packed.g_idx.long(), stable=True).indices
        integers = integers[:, order]
    return UnpackedLinear(integers, scales.to(torch.float32), zeros, order)


def stacked(layers: list[PackedLinear]) -> PackedLinear | None:
    """Join layers that read the same input, outputs one after the other; None: their orders differ."""
    first = layers[0]
    if not all(torch.equal(layer.g_idx, first.g_idx) for layer in layers):
        return None
    qweight, qzeros, scales = (
        torch.cat([getattr(layer, name) for layer in layers], dim=1)
        for name in ("qweight", "qzeros", "scales")
    )
    return PackedLinear(qweight, qzeros, scales, first.g_idx)


class Dense:
    """A matrix [out, in] in the dtype of the activations, and a bias [out] or None.

    ``layer`` is the matrix as a compiled decode step reads it; None: C does not multiply it here.
    """

    name = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.layer: PackedWeights | None = plain(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        return dense.multiply(x, self.weight, self.bias)


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
