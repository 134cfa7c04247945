"""Keep keys and values of a batch of sequences, each row with its own length.

Row r's token p lies in slot p, whatever the other rows hold: no row is padded on the left, a token's slot is
its position, and "may see" is one comparison (slot ≤ position). What lies behind a row's length is free.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.errors import UsageError
from qwenq.runtime.memory import require


@dataclass(frozen=True)
class Span:
    """Where one forward pass writes, and what its queries may see."""

    # int64 [batch or 1, tokens]; 1 when all rows are alike. The padding of shorter rows is clamped below
    # ``end``.
    positions: Tensor
    start: int | None  # the first slot, where it is the same in all rows and no row is padded; else None
    end: int  # slots 0 … end-1 are read
    causal: bool  # every row starts at slot 0: query t sees keys 0 … t and no mask is needed
    # bool [batch or 1, 1, tokens, end], true where a query may look; None: causal, or one query that sees
    # everything
    mask: Tensor | None
    rows: Tensor | None = None  # int64 [written], the row of each real token; None unless rows differ
    steps: Tensor | None = None  # likewise, its step
    counts: Tensor | None = None  # int64 [batch], the real tokens of each row; None: no row is padded


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
    each = torch.tensor(counts, device=device)
    rows, kept = (steps < each.unsqueeze(1)).nonzero(as_tuple=True)
    positions = (starts + steps).clamp_max(max(ends) - 1)  # [batch, tokens]
    mask = None if from_zero else _visible(positions, max(ends))
    return Span(
        positions, None, max(ends), from_zero, mask, rows, kept, each if min(counts) < tokens else None
    )


def _visible(positions: Tensor, end: int) -> Tensor:
    slots = torch.arange(end, device=positions.device)
    return (slots <= positions.unsqueeze(-1)).unsqueeze(1)  # [batch or 1, 1, tokens, end]


# Arrange keys and values as decode steps on a CPU read them fastest.
#
# Keys lie transposed, as their product with a query runs over slots. All is float32: products of so few
# rows are slower in bfloat16 on a CPU, and scores keep their precision.


@dataclass(frozen=True)
class Step:
    """One decode step: the newest token of every row, over a cache that is arranged for it."""

    positions: Tensor  # int64 [batch or 1, 1]; 1 when all rows are alike
    end: int  # slots 0 … end-1 are read
    keys: Sequence[Tensor]  # per layer float32 [batch · heads, d, end], the slots side by side
    values: Sequence[Tensor]  # per layer float32 [batch · heads, end, d]
    # per layer [batch, heads, d], where the new key goes; None: rows differ
    key_slots: Sequence[Tensor] | None
    value_slots: Sequence[Tensor] | None  # likewise, where the new value goes
    # float32 [batch · heads, 1, end], -inf behind a row's length; None: no row is shorter
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


LOWER = (
    "ask for fewer new tokens (--max-new-tokens; in profile --tokens), a shorter prompt (there --context) "
    "or fewer rows at once (in eval --batch)"
)
"""What to do where a cache does not fit."""


@dataclass(frozen=True)
class StateShape:
    """Sizes of what a linear-attention layer keeps of a row, whatever its length."""

    # (channels, width): the last inputs of its convolution, in the dtype of the activations
    conv: tuple[int, int]
    recurrent: tuple[int, int, int]  # (heads, key width, value width): float32


class KVCache:
    """Preallocated keys and values of all layers that attend, and the states of those that do not.

    Args:
        layers, batch, heads, capacity, head_dim: sizes; ``heads`` counts the key/value heads.
        device, dtype: of the tensors.
        states: of each linear-attention layer, in order; a row without tokens has zeros.

    Attributes:
        lengths: tokens in each row.
        alphas: NTK factor with which each row's keys were rotated (1 for all but long Qwen v1 prompts).
        keys, values: one [batch, heads, capacity, d] per layer.
        states: (convolution, recurrent) per linear-attention layer, [batch, …] each.

    Raises:
        OutOfMemoryError: more bytes than are free.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        states: Sequence[StateShape] = (),
    ) -> None:
        if batch < 0 or capacity < 0:
            raise UsageError(f"a cache cannot have {batch} rows of {capacity} tokens")
        self.lengths = [0] * batch
        self.alphas = [1] * batch
        self._dtype = dtype
        self._arranged: StepLayout | None = None
        shape = (batch, heads, capacity, head_dim)
        require(
            2 * layers * math.prod(shape) * dtype.itemsize
            + batch * sum(math.prod(s.conv) * dtype.itemsize + math.prod(s.recurrent) * 4 for s in states),
            device,
            f"a cache of {batch} rows of {capacity} tokens",
            LOWER,
        )
        # Zeros, because a masked NaN would still poison the sum over values.
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)] for _ in range(2)
        )
        self._state_shapes = tuple(states)
        self.states = [
            (
                torch.zeros(batch, *state.conv, device=device, dtype=dtype),
                torch.zeros(batch, *state.recurrent, device=device, dtype=torch.float32),
            )
            for state in states
        ]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.keys[0].shape[2]

    @property
    def form(self) -> tuple[int, int, int, torch.dtype]:
        """Layers, key/value heads, head width and dtype: another model's cache differs in one of them."""
        return len(self.keys), self.keys[0].shape[1], self.keys[0].shape[3], self._dtype

    def can_rewind(self, row: int, length: int) -> bool:
        """Return whether a row can be cut to a length: one with states only to nothing, or not at all."""
        return not self.states or length in (0, self.lengths[row])

    def rewind(self, lengths: int | Sequence[int]) -> None:
        """Forget what lies behind the given length of each row.

        Raises:
            UsageError: a length is negative or more than the row holds, or a recurrent state would have to be
                that of an earlier token; ``take`` a copy of the row before it goes on.
        """
        wanted = [lengths] * self.batch if isinstance(lengths, int) else list(lengths)
        if len(wanted) != self.batch or any(
            not 0 <= new <= old for new, old in zip(wanted, self.lengths, strict=True)
        ):
            raise UsageError(f"the cache holds {self.lengths} tokens, it cannot be rewound to {wanted}")
        if not all(self.can_rewind(row, new) for row, new in enumerate(wanted)):
            raise UsageError(
                f"the cache holds recurrent states after {self.lengths} tokens: those after {wanted} are gone"
            )
        self._forget_states([row for row, new in enumerate(wanted) if not new])
        self.lengths = wanted

    def reserve(self, capacity: int) -> None:
        """Make room for at least ``capacity`` tokens in each row; what is there stays."""
        if self.capacity >= capacity:
            return
        first, layers = self.keys[0], len(self.keys)
        added = (capacity - self.capacity) * first[:, :, 0].numel() * self._dtype.itemsize
        what = f"a cache of {self.batch} rows of {capacity} tokens instead of {self.capacity}"
        require(2 * layers * added, first.device, what, LOWER)
        self._arrange_plainly()
        # The first keys come last: `capacity` is theirs, and Ctrl-C may come between two layers.
        for tensors in (self.values, self.keys):
            for layer in reversed(range(layers)):
                old = tensors[layer]
                if old.shape[2] >= capacity:
                    continue
                grown = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                grown[:, :, : old.shape[2]] = old
                tensors[layer] = grown

    def clear(self, rows: Sequence[int]) -> None:
        """Empty these rows, as if nothing had ever been in them; the others stay."""
        self._check_rows(rows)
        for row in rows:
            self.lengths[row], self.alphas[row] = 0, 1
        self._forget_states(rows)

    def take(self, rows: Sequence[int], capacity: int | None = None) -> KVCache:
        """Return a new cache whose row i is a copy of row ``rows[i]``; a row may be named many times.

        A prefix that many sequences share is encoded once and taken many times; the rows of a batch that are
        not finished yet are taken together, so that the rest costs nothing more.
        """
        self._check_rows(rows)
        capacity = self.capacity if capacity is None else capacity
        lengths = [self.lengths[row] for row in rows]
        held = max(lengths, default=0)
        if held > capacity:
            raise UsageError(f"{held} tokens do not fit into a cache of {capacity}")
        heads, head_dim = self.keys[0].shape[1], self.keys[0].shape[3]
        device = self.keys[0].device
        sizes = (len(self.keys), len(rows), heads, capacity, head_dim)
        copy = KVCache(*sizes, device, self._dtype, self._state_shapes)
        copy.lengths, copy.alphas = lengths, [self.alphas[row] for row in rows]
        copy._copy_rows(range(len(rows)), self, rows, held)
        return copy

    def put(self, rows: Sequence[int], source: KVCache) -> None:
        """Replace row ``rows[i]`` by row i of another cache of the same model; the others stay.

        A finished row of a batch makes room for the next prompt: prefill that alone, then put it there.
        """
        self._check_rows(rows)
        if len(rows) != source.batch or len(set(rows)) != len(rows):
            raise UsageError(f"{source.batch} rows cannot be put into the rows {list(rows)} of a cache")
        held = max(source.lengths, default=0)
        if held > self.capacity:
            raise UsageError(f"{held} tokens do not fit into a cache of {self.capacity}")
        self._copy_rows(rows, source, range(source.batch), held)
        for row, length, alpha in zip(rows, source.lengths, source.alphas, strict=True):
            self.lengths[row], self.alphas[row] = length, alpha

    def keep(self, rows: Collection[int]) -> list[int]:
        """Drop all other rows in place: little is copied, and no memory is freed.

        For each row that is left, return which one it was: itself where it can be, else it fills a gap.
        """
        kept = sorted(set(rows))
        self._check_rows(kept)
        if not kept:
            raise UsageError("a cache keeps at least one of its rows")
        behind = [row for row in kept if row >= len(kept)]
        order = [row if row in kept else behind.pop() for row in range(len(kept))]
        for row, was in ((row, was) for row, was in enumerate(order) if row != was):
            for tensor in (*self.keys, *self.values):
                tensor[row, :, : self.lengths[was]] = tensor[was, :, : self.lengths[was]]
            for state in self.states:
                for tensor in state:
                    tensor[row] = tensor[was]
        self.keys, self.values = ([layer[: len(order)] for layer in own] for own in (self.keys, self.values))
        self.states = [(conv[: len(order)], recurrent[: len(order)]) for conv, recurrent in self.states]
        if self._arranged is not None:
            self._arranged.narrow(len(order))
        self.lengths, self.alphas = ([own[was] for was in order] for own in (self.lengths, self.alphas))
        return order

    def _check_rows(self, rows: Sequence[int]) -> None:
        if wrong := [row for row in rows if not 0 <= row < self.batch]:
            raise UsageError(f"a cache of {self.batch} rows has no row {wrong[0]}")

    def _refuse_more_than(self, end: int) -> None:
        if end > self.capacity:
            raise UsageError(
                f"{end} tokens do not fit into a cache of {self.capacity}",
                hint="shorten the prompt or ask for fewer new tokens",
            )

    def _arrange_plainly(self) -> None:
        """Go back to one [batch, heads, capacity, d] per layer, in the dtype of the activations."""
        if self._arranged is not None:
            shape = self.keys[0].shape
            self._move_to(
                [torch.zeros(shape, dtype=self._dtype) for _ in self.keys],
                [torch.zeros(shape, dtype=self._dtype) for _ in self.values],
            )
            self._arranged = None

    def _move_to(self, keys: list[Tensor], values: list[Tensor]) -> None:
        held = max(self.lengths)
        for old, new in ((self.keys, keys), (self.values, values)):
            for source, target in zip(old, new, strict=True):
                target[:, :, :held] = source[:, :, :held]
        self.keys, self.values = keys, values

    def _copy_rows(self, rows: Sequence[int], source: KVCache, theirs: Sequence[int], held: int) -> None:
        """Copy slots 0 … held-1 and states of the other cache's rows into these rows."""
        for row, their in zip(rows, theirs, strict=True):
            for mine, other in ((self.keys, source.keys), (self.values, source.values)):
                for target, origin in zip(mine, other, strict=True):
                    target[row, :, :held] = origin[their, :, :held]
            for own, others in zip(self.states, source.states, strict=True):
                for target, origin in zip(own, others, strict=True):
                    target[row] = origin[their]

    def _forget_states(self, rows: Sequence[int]) -> None:
        for tensor in (tensor for state in self.states for tensor in state):
            for row in rows:
                tensor[row] = 0

    def span(self, counts: Sequence[int]) -> Span:
        """Plan a forward pass over ``counts[r]`` new tokens of each row r, padded on the right."""
        self._arrange_plainly()
        self._refuse_more_than(max(old + new for old, new in zip(self.lengths, counts, strict=True)))
        return plan(self.lengths, counts, self.keys[0].device)

    def write(self, layer: int, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Put [batch, heads, tokens, d] into a layer's slots; return that layer's slots 0 … end-1."""
        stored_keys, stored_values = self.keys[layer], self.values[layer]
        if span.start is not None:
            stored_keys[:, :, span.start : span.end] = keys
            stored_values[:, :, span.start : span.end] = values
        else:
            slots = span.positions[span.rows, span.steps]
            stored_keys[span.rows, :, slots] = keys[span.rows, :, span.steps]  # [written, heads, d]
            stored_values[span.rows, :, slots] = values[span.rows, :, span.steps]
        return stored_keys[:, :, : span.end], stored_values[:, :, : span.end]

    def arrange_for_steps(self, capacity: int = 0) -> StepLayout:
        """Bring keys and values, once, to the form that `step` reads, on the CPU, with room for ``capacity``.

        A cache that is made small and arranged with its real capacity while it is empty never holds both.
        """
        if self._arranged is None or capacity > self.capacity:
            _, heads, slots, d = self.keys[0].shape
            layout = StepLayout(len(self.keys), self.batch, heads, max(capacity, slots), d, LOWER)
            self._move_to(*layout.views())
            self._arranged = layout
        return self._arranged

    def step(self) -> Step:
        """Plan a decode step on the CPU: one new token in every row."""
        end = max(self.lengths) + 1
        self._refuse_more_than(end)
        return self.arrange_for_steps().step(self.next_positions(), end)

    def next_positions(self) -> Tensor:
        """Return the positions of one more token, int64 [batch or 1, 1]; 1 when all rows are alike."""
        if min(self.lengths) == max(self.lengths):
            return torch.tensor([self.lengths[:1]])
        return torch.tensor(self.lengths).unsqueeze(1)

    def laid_out_for_step(self) -> tuple[Tensor, Tensor]:
        """Return all layers as `step` lays them out: `StepLayout`'s keys and values, for compiled code.

        Rows that were dropped leave gaps between layers; there are no others.
        """
        self._refuse_more_than(max(self.lengths) + 1)
        layout = self.arrange_for_steps()
        return layout.keys, layout.values

    def write_step(self, layer: int, keys: Tensor, values: Tensor, step: Step) -> None:
        """Put the new token of each row, float32 [batch, heads, d], into a layer's slots."""
        if step.key_slots is not None and step.value_slots is not None:
            step.key_slots[layer].copy_(keys)
            step.value_slots[layer].copy_(values)
        else:
            rows, slots = torch.arange(self.batch), step.positions[:, 0]
            self.keys[layer][rows, :, slots] = keys
            self.values[layer][rows, :, slots] = values

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens in, once all layers have written them."""
        self.lengths = [old + new for old, new in zip(self.lengths, counts, strict=True)]
