"""What a kernel is, and what it is told before it says whether it can.

A kernel is a class: ``why_not(need)`` answers for a whole model, its constructor takes one linear layer as it
lies in the file and keeps it in the layout that it reads fastest. New ones are listed in ``table``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qwenq.errors import UnsupportedError
from qwenq.models.packing import CheckpointFormat, PackedLinear, has_trivial_g_idx, unpack


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


@dataclass(frozen=True)
class Layer:
    """Sizes of one quantised linear, as headers and ``g_idx`` tell them.

    Attributes:
        name: of the module.
        in_features, out_features: of the weight.
        even: whether the group size divides the columns.
    """

    name: str
    in_features: int
    out_features: int
    even: bool = True


@dataclass(frozen=True)
class Need:
    """Everything that decides whether a kernel can run a model.

    Attributes:
        bits: 2, 4 or 8.
        group_size: input columns that share a scale; -1 for all of them.
        checkpoint_format: how zero points are stored.
        device, dtype: where, and of the activations.
        layers: every quantised linear of the model.
    """

    bits: int
    group_size: int
    checkpoint_format: CheckpointFormat
    device: torch.device
    dtype: torch.dtype
    layers: tuple[Layer, ...] = ()


class QuantisedKernel(Kernel, Protocol):
    """A kernel over packed integers.

    Attributes:
        device_type: ``cpu``, ``cuda``, or ``any``: a kernel of another device is not called passed over.
    """

    device_type: ClassVar[str]

    def __init__(self, packed: PackedLinear, need: Need, bias: Tensor | None) -> None:
        """Take one linear layer; ``packed`` and ``bias`` lie on the CPU, what is kept on ``need.device``."""

    @staticmethod
    def why_not(need: Need) -> str | None:
        """Why this kernel cannot run such a model here, in words that follow "because"; None: it can."""
        ...


@dataclass(frozen=True)
class Grouped:
    """One quantised linear as plain integers, the columns of each group side by side.

    Attributes:
        integers: uint8 [out, in].
        scales: float32 [out, groups], of either sign.
        zeros: uint8 [out, groups].
        order: int64 [in], the input column of each stored one; None: as they come.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None

    @property
    def group_size(self) -> int:
        """Columns of each group."""
        return self.integers.shape[1] // self.scales.shape[1]

    def offsets(self, middle: int) -> Tensor | None:
        """Float32 [out, groups], ``scale · (middle - zero)``: what a kernel around ``middle`` leaves out.

        None where every zero point is the middle, as in a symmetric model.
        """
        shift = middle - self.zeros.to(torch.float32)
        return self.scales * shift if bool(shift.any()) else None


def grouped(packed: PackedLinear, need: Need) -> Grouped:
    """Unpack a layer; columns in activation order are sorted by group.

    Raises:
        UnsupportedError: groups of unequal size.
    """
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
    return Grouped(integers, scales.to(torch.float32), zeros, order)


def stacked(layers: list[PackedLinear]) -> PackedLinear | None:
    """Layers that read the same input as one, outputs one after the other; None: their orders differ."""
    first = layers[0]
    if not all(torch.equal(layer.g_idx, first.g_idx) for layer in layers):
        return None
    return PackedLinear(
        torch.cat([layer.qweight for layer in layers], dim=1),
        torch.cat([layer.qzeros for layer in layers], dim=1),
        torch.cat([layer.scales for layer in layers], dim=1),
        first.g_idx,
    )
