"""Widen an MLP with zero channels, so that its groups can be shared among GPUs. Exact by construction.

A quantised ``down_proj`` of 29568 inputs has 231 groups of 128: no two GPUs can share them evenly. Qwen's
own fix widens the MLP to 29696 before quantising it, with one zero channel after each of the first 128
channels, so that no group consists of zeros alone. A zero channel adds ``silu(0) * 0`` times a zero column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenq.errors import UsageError
from qwenq.models.source import TensorInfo

if TYPE_CHECKING:
    import torch

    from qwenq.models.checkpoint import Checkpoint

_PADDED_AXIS = {
    "mlp.gate_proj.weight": 0,  # [ffn, hidden]
    "mlp.gate_proj.bias": 0,
    "mlp.up_proj.weight": 0,
    "mlp.up_proj.bias": 0,
    "mlp.down_proj.weight": 1,  # [hidden, ffn]
}


def padded_width(ffn: int, group_size: int, tensor_parallel: Iterable[int] = (8,)) -> int:
    """Return the smallest width >= ffn whose groups can be shared among each of these numbers of GPUs.

    The least multiple of ``group_size * lcm(tensor_parallel)``: 29568 becomes 29696, 13696 becomes 14336.
    """
    step = group_size * math.lcm(*tensor_parallel)
    return -(-ffn // step) * step


def padded_groups(to: int, group_size: int) -> int:
    """Return groups of ``down_proj`` after padding: ``to / group_size``."""
    if to % group_size:
        raise UsageError(
            f"an FFN of {to} channels is no multiple of the group size {group_size}",
            where="--pad-ffn",
            hint=f"choose {padded_width(to, group_size, (1,))}, the next one, or auto",
        )
    return to // group_size


def interleave_zeros(tensor: torch.Tensor, to: int, axis: int) -> torch.Tensor:
    """Copy a tensor to length ``to`` on ``axis``: a zero slice after each of its first slices."""
    length = tensor.shape[axis]
    zeros = _zeros(length, to)
    source = tensor.movedim(axis, 0)
    padded = source.new_zeros((to, *source.shape[1:]))
    padded[: 2 * zeros : 2] = source[:zeros]
    padded[2 * zeros :] = source[zeros:]
    return padded.movedim(0, axis).contiguous()


def _zeros(length: int, to: int) -> int:
    zeros = to - length
    if not 0 <= zeros <= length:
        raise UsageError(
            f"an FFN of {length} channels cannot be padded to {to}",
            where="--pad-ffn",
            hint=f"choose a width between {length} and {2 * length}",
        )
    return zeros


def widened(checkpoint: Checkpoint, to: int | None) -> Checkpoint:
    """Return the same unquantised model with MLPs of ``to`` channels; its outputs stay the same.

    Nothing is read for that. It is the checkpoint itself where it has that width already, or ``to`` is
    None: a mixture of experts has no MLP of one width.
    """
    ffn = checkpoint.config.get("intermediate_size")
    if to is None or ffn is None or not _zeros(int(ffn), to):
        return checkpoint
    return replace(
        checkpoint,
        source=PaddedFFNSource(checkpoint, to),
        config=checkpoint.config | {"intermediate_size": to},
    )


class PaddedFFNSource:
    """A lazy view of an unquantised checkpoint whose MLPs are ``to`` channels wide, see ``widened``."""

    def __init__(self, base: Checkpoint, to: int) -> None:
        self._base, self._source, self._to = base, base.source, to

    @property
    def decided_by(self) -> dict[str, Any]:
        """Return all that the values follow from: ``fingerprint`` need not read the model a second time."""
        return {"base": self._base.fingerprint, "ffn": self._to}

    def names(self) -> Iterable[str]:
        """Return all tensor names, in file order."""
        return self._source.names()

    def info(self, name: str) -> TensorInfo:
        """Return shape (padded) and dtype from the header alone."""
        info = self._source.info(name)
        axis = _padded_axis(name)
        if axis is None:
            return info
        shape = (*info.shape[:axis], self._to, *info.shape[axis + 1 :])
        return TensorInfo(shape, info.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU, padded where it belongs to an MLP."""
        tensor = self._source.read(name)
        axis = _padded_axis(name)
        return tensor if axis is None else interleave_zeros(tensor, self._to, axis)


def _padded_axis(name: str) -> int | None:
    return next((axis for suffix, axis in _PADDED_AXIS.items() if name.endswith(suffix)), None)
