"""Arrange keys and values as decode steps on a CPU read them fastest.

Keys lie transposed, as their product with a query runs over slots. All is float32: products of so few
rows are slower in bfloat16 on a CPU, and scores keep their precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.runtime.memory import require


@dataclass(frozen=True)
class Step:
    """One decode step: the newest token of every row, over a cache that is arranged for it.

    Attributes:
        positions: int64 [batch or 1, 1]; 1 when all rows are alike.
        end: slots 0 … end-1 are read.
        keys: per layer float32 [batch · heads, d, end], the slots side by side.
        values: per layer float32 [batch · heads, end, d].
        key_slots, value_slots: per layer [batch, heads, d], where the new token goes; None: rows differ.
        mask: float32 [batch · heads, 1, end], -inf behind a row's length; None: no row is shorter.
    """

    positions: Tensor
    end: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    key_slots: Sequence[Tensor] | None
    value_slots: Sequence[Tensor] | None
    mask: Tensor | None


class StepLayout:
    """All layers' keys and values in two tensors.

    Attributes:
        keys: float32 [layers, batch, heads, d, slots]; there are a few more slots than the capacity.
        values: float32 [layers, batch, heads, slots, d].
    """

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head_dim: int, hint: str) -> None:
        # Rows of keys that lie a power of two apart would share few lines of the processor's cache.
        slots = -(-capacity // 16) * 16 + 16
        needed = 8 * layers * batch * heads * slots * head_dim
        require(needed, torch.device("cpu"), f"decoding {batch} rows of {capacity} tokens", hint)
        self._capacity = capacity
        self.keys = torch.zeros(layers, batch, heads, head_dim, slots)
        self.values = torch.zeros(layers, batch, heads, slots, head_dim)

    def views(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return keys and values, one [batch, heads, capacity, d] per layer each."""
        keys = [layer.transpose(-1, -2)[:, :, : self._capacity] for layer in self.keys.unbind(0)]
        return keys, [layer[:, :, : self._capacity] for layer in self.values.unbind(0)]

    def narrow(self, batch: int) -> None:
        """Keep the first rows alone, where they lie: no memory is freed."""
        self.keys, self.values = self.keys[:, :batch], self.values[:, :batch]

    def step(self, positions: Tensor, end: int) -> Step:
        """Return the views of a step whose tokens go to ``positions`` [batch or 1, 1], below ``end``."""
        heads = self.keys.shape[2]
        key_slots = value_slots = mask = None
        if len(positions) == 1:
            key_slots = self.keys[..., end - 1].unbind(0)
            value_slots = self.values[..., end - 1, :].unbind(0)
        else:
            behind = torch.arange(end) > positions  # [batch, end]
            mask = torch.zeros(behind.shape).masked_fill_(behind, float("-inf"))
            mask = mask.repeat_interleave(heads, dim=0).unsqueeze(1)
        keys = self.keys.flatten(1, 2)[..., :end].unbind(0)  # views [batch · heads, d, end] of each layer
        values = self.values.flatten(1, 2)[:, :, :end].unbind(0)
        return Step(positions, end, keys, values, key_slots, value_slots, mask)
