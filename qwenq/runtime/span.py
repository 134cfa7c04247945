"""Plan where one forward pass writes into a cache, and what its queries may see there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Where one forward pass writes, and what its queries may see.

    Attributes:
        positions: int64 [batch or 1, tokens]; 1 when all rows are alike. The padding of shorter rows is
            clamped below ``end``.
        start: the first slot, where it is the same in all rows and no row is padded; else None.
        end: slots 0 … end-1 are read.
        causal: every row starts at slot 0: query t sees keys 0 … t and no mask is needed.
        mask: bool [batch or 1, 1, tokens, end], true where a query may look; None: causal, or one query that
            sees everything.
        rows, steps: int64 [written] row and step of each real token, None unless rows differ.
    """

    positions: Tensor
    start: int | None
    end: int
    causal: bool
    mask: Tensor | None
    rows: Tensor | None = None
    steps: Tensor | None = None


def plan(lengths: Sequence[int], counts: Sequence[int], device: torch.device) -> Span:
    """Plan a pass over ``counts[r]`` new tokens behind the ``lengths[r]`` of each row."""
    tokens, first = max(counts), lengths[0]
    ends = [old + new for old, new in zip(lengths, counts, strict=True)]
    from_zero = not any(lengths)
    if len(set(lengths)) == 1 and len(set(counts)) == 1:
        positions = torch.arange(first, first + tokens, device=device).unsqueeze(0)
        mask = None if from_zero or tokens == 1 else _visible(positions, ends[0])
        return Span(positions, first, ends[0], from_zero, mask)
    starts = torch.tensor(lengths, device=device).unsqueeze(1)
    steps = torch.arange(tokens, device=device).unsqueeze(0)
    rows, kept = (steps < torch.tensor(counts, device=device).unsqueeze(1)).nonzero(as_tuple=True)
    positions = (starts + steps).clamp_max(max(ends) - 1)  # [batch, tokens]
    mask = None if from_zero else _visible(positions, max(ends))
    return Span(positions, None, max(ends), from_zero, mask, rows, kept)


def _visible(positions: Tensor, end: int) -> Tensor:
    slots = torch.arange(end, device=positions.device)
    return (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # [batch or 1, 1, tokens, end]
