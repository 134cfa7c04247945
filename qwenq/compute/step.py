"""Run a decode step in one call: every block of a decoder for one new token in each row (``csrc/step.c``).

The reference is `StepOperations` of ``runtime.block``, with a few hundred calls of torch; in a small model
these take longer than the products.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from qwenq.compute import cpu
from qwenq.compute.linear import PackedWeights, activation_bytes

STRETCH = 256  # slots of a cache that attention takes together, as in C
MULTIPLE = 32  # of every width: halves of a head fill registers
MOST_HEAD_DIM = 256  # of keys and values, and of linear attention's
_HEADS_AT_ONCE = 4
_EXPERTS_AT_ONCE = 16  # registers of any variant are filled


@dataclass(frozen=True)
class StepShape:
    """Sizes of a decoder."""

    layers: int
    hidden: int
    ffn: int  # the width of the dense MLPs; 0: there is none
    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of the norms
    experts: int = 0  # of a mixture; 0: there is none
    active: int = 0  # how many of them a row takes
    expert_width: int = 0  # of one
    normalised: bool = False  # whether their shares are made to add up to one
    shared_width: int = 0  # of the expert that all rows take; 0: there is none
    gated: bool = False  # whether what attention mixes is gated by as many outputs of qkv behind the values
    key_heads: int = 0  # of linear attention; 0: no block has it
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    kernel: int = 0  # width of its convolution

    @property
    def mixed(self) -> int:
        """Return the width of what attention mixes."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Return the outputs of qkv, where a block attends to all tokens."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim + self.gated * self.mixed

    @property
    def state_values(self) -> int:
        """Return the width of what linear attention mixes."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Return the channels of its convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.state_values


@dataclass(frozen=True)
class Recurrence:
    """What a linear-attention block has besides qkv, z and out; tensors are float32."""

    rates: PackedWeights  # hidden → strength and decay of each value head
    convolution: Tensor  # [kernel, channels]
    speed: Tensor  # [value_heads], of the decay
    bias: Tensor  # [value_heads], of the decay
    norm: Tensor  # [value_dim]


@dataclass(frozen=True)
class StepBlock:
    """The weights of a block; vectors are float32."""

    # qkv, out; of linear attention, the first gives queries, keys, values and z
    linears: tuple[PackedWeights, PackedWeights]
    # gate_up, down; of a mixture, those of each expert, with the same sizes and group sizes
    mlps: tuple[tuple[PackedWeights, PackedWeights], ...]
    norms: tuple[Tensor, Tensor]  # attention_norm [hidden], mlp_norm [hidden]
    qkv_bias: Tensor | None = None  # [(heads + 2 kv_heads) · d]
    qk_norm: Tensor | None = None  # [heads + kv_heads, d]
    router: Tensor | None = None  # [experts, hidden], of the result's dtype; None: the block is no mixture
    # gate_up, down of the expert that all rows take, and its gate [hidden]
    shared: tuple[PackedWeights, PackedWeights, Tensor] | None = None
    recurrence: Recurrence | None = None  # None: the block attends to all earlier tokens


def unsupported_reason(shape: StepShape) -> str | None:
    """Return why C cannot run such a step here, in words that follow "because"; None: it can."""
    if reason := cpu.unsupported_reason():
        return reason
    widths = shape.hidden, shape.ffn, shape.expert_width, shape.shared_width
    heads = shape.head_dim, shape.key_dim, shape.value_dim
    if any(width % MULTIPLE for width in (*widths, *heads)):
        return f"sizes are not multiples of {MULTIPLE}"
    if max(heads) > MOST_HEAD_DIM:
        return f"heads are wider than {MOST_HEAD_DIM}"
    return None


class DecodeStep:
    """A decoder's blocks and final norm, run by C; ``dtype``, float32 or bfloat16, is that of the result.

    What a step writes to is kept for the next; one step runs at a time.
    """

    def __init__(
        self, shape: StepShape, blocks: Sequence[StepBlock], norm: Tensor, dtype: torch.dtype
    ) -> None:
        self._shape, self._blocks, self._norm, self._dtype = shape, list(blocks), norm, dtype
        self._tables: list[Tensor] = []
        self._recurrent = [number for number, block in enumerate(self._blocks) if block.recurrence]
        self._linears = torch.tensor([self._layers(block) for block in self._blocks])  # [layers, LINEARS]
        self._vectors = torch.tensor([_vectors(block) for block in self._blocks])  # [layers, VECTORS]
        self._workspace: _Workspace | None = None
        self._alone = Lock()  # C lets other threads of Python run

    def _layers(self, block: StepBlock) -> list[int]:
        """Return the addresses of a block's layers in C's order; of experts, those of two tables."""
        mlp = [layer.fields.data_ptr() for layer in block.mlps[0]]
        if block.router is not None:
            each = [[layer.fields.data_ptr() for layer in mlp] for mlp in block.mlps]
            table = torch.tensor(each, dtype=torch.int64).T.contiguous()  # [2, experts]
            self._tables.append(table)
            mlp = [row.data_ptr() for row in table]
        qkv, out = (layer.fields.data_ptr() for layer in block.linears)
        rates = 0 if block.recurrence is None else block.recurrence.rates.fields.data_ptr()
        shared = (0, 0) if block.shared is None else (layer.fields.data_ptr() for layer in block.shared[:2])
        return [qkv, out, *mlp, rates, *shared]

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: Sequence[int],
        states: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> Tensor:
        """Return [rows, hidden] after the final norm; add keys and values of the new tokens to the cache.

        Args:
            x: [rows, hidden], the new tokens' embeddings.
            cos, sin: float32 [rows or 1, heads + kv_heads, d]; queries' are scaled, the first halves' sines
                negated.
            keys: float32 [layers that attend to all tokens, rows, kv_heads, d, slots]; slots a multiple of
                16, at least 16 more than a row holds.
            values: float32 [the same layers, rows, kv_heads, slots, d].
            lengths: tokens of each row so far.
            states: of each block with linear attention, [rows, channels, kernel] of the result's dtype, and
                float32 [rows, value_heads, key_dim, value_dim]; changed.

        Raises:
            ValueError: tensors of other shapes, dtypes or strides.
        """
        rows, slots = len(x), keys.shape[-1]
        self._check(x, cos, sin, keys, values, lengths)
        self._check_states(rows, states)
        y = torch.empty(rows, self._shape.hidden, dtype=self._dtype)
        with self._alone:
            held = self._workspace
            if held is None or not held.fits(rows, slots):
                held = self._workspace = _Workspace(
                    self._shape, rows, slots, self._linears, self._vectors, self._norm
                )
            held.x.copy_(x)
            held.positions[:] = torch.tensor(lengths)
            for number, pair in zip(self._recurrent, states, strict=True):
                held.states[number] = torch.tensor([state.data_ptr() for state in pair])
            held.run(
                cos=cos.data_ptr(), sin=sin.data_ptr(), rotation_stride=cos[0].numel() if len(cos) > 1 else 0,
                keys=keys.data_ptr(), values=values.data_ptr(), slots=slots, layer_stride=keys.stride(0),
                y=y.data_ptr(), dtype=cpu.DTYPE_CODES[self._dtype], splits=max(lengths) // STRETCH + 1,
            )  # fmt: skip
        return y

    def _check(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]
    ) -> None:
        shape, rows, slots, d = self._shape, len(x), keys.shape[-1], self._shape.head_dim
        cpu.require("x", x, x.dtype, (rows, shape.hidden), contiguous=False)
        for name, table in (("cos", cos), ("sin", sin)):
            rotated = len(cos) if len(cos) == 1 else rows
            cpu.require(name, table, torch.float32, (rotated, shape.heads + shape.kv_heads, d))
        head = shape.layers - len(self._recurrent), rows, shape.kv_heads
        for name, cached, sizes in (("keys", keys, (d, slots)), ("values", values, (slots, d))):
            cpu.require(name, cached, torch.float32, (*head, *sizes), contiguous=False)
        dense = keys[:1].is_contiguous() and values[:1].is_contiguous() and keys.stride(0) == values.stride(0)
        if not dense or len(lengths) != rows or slots % 16 or max(lengths) + 16 > slots:
            strides = f"strides {keys.stride()} and {values.stride()}"
            raise ValueError(f"a cache with {strides} and lengths {list(lengths)} does not fit {shape}")

    def _check_states(self, rows: int, states: Sequence[tuple[Tensor, Tensor]]) -> None:
        shape = self._shape
        recurrent = rows, shape.value_heads, shape.key_dim, shape.value_dim
        for inputs, state in states:
            cpu.require("states of a convolution", inputs, self._dtype, (rows, shape.channels, shape.kernel))
            cpu.require("states of a delta rule", state, torch.float32, recurrent)


class _Workspace:
    """What a step of so many rows writes to, and its arguments.

    Args:
        slots: of each row of the cache, at most.
        linears, vectors: addresses of each block, int64 [layers, LINEARS] and [layers, VECTORS] of C.
        norm: float32 [hidden].
    """

    def __init__(
        self, shape: StepShape, rows: int, slots: int, linears: Tensor, vectors: Tensor, norm: Tensor
    ) -> None:
        self._rows, self._slots, threads = rows, slots, torch.get_num_threads()
        d, mixed = shape.head_dim, max(shape.mixed, shape.state_values)
        widest = max(shape.hidden, shape.ffn, mixed, shape.shared_width)
        pairs, likely = rows * shape.active, -(-shape.experts // _EXPERTS_AT_ONCE) * _EXPERTS_AT_ONCE
        activations = max(activation_bytes(rows, widest), activation_bytes(pairs, shape.expert_width))
        self.x = torch.zeros(rows, shape.hidden)
        self.positions = torch.zeros(rows, dtype=torch.int64)
        self.states = torch.zeros(shape.layers, 2, dtype=torch.int64)
        self._held = {
            "x": self.x,
            "positions": self.positions,
            "workspace": torch.zeros(activations, dtype=torch.uint8),
            "qkv": torch.zeros(rows, max(shape.qkv, shape.channels + shape.state_values)),
            "mixed": torch.zeros(rows, mixed),
            "rates": torch.zeros(rows, 2 * shape.value_heads),
            "states": self.states,
            "shared_gate_up": torch.zeros(rows, 2 * shape.shared_width),
            "factors": torch.zeros(rows),
            "gate_up": torch.zeros(2 * max(rows * shape.ffn, pairs * shape.expert_width)),
            "likely": torch.zeros(rows, likely),
            "shares": torch.zeros(pairs),
            "routes": torch.zeros(shape.experts + 1 + 2 * pairs, dtype=torch.int64),
            "scores": torch.zeros(threads, _HEADS_AT_ONCE, STRETCH),
            "parts": torch.zeros(rows, shape.heads, -(-slots // STRETCH), d + 2),
            "linears": linears,
            "vectors": vectors,
            "norm": norm,
        }
        names = _fields()
        self._threads, self._places = threads, {name: place for place, name in enumerate(names, 1)}
        self._args = (ctypes.c_int64 * (len(names) + 1))(threads)
        self._set({name: tensor.data_ptr() for name, tensor in self._held.items()})
        sizes = ["layers", "hidden", "heads", "kv_heads", "experts", "active", "normalised"]
        sizes += ["key_heads", "value_heads", "key_dim", "value_dim", "kernel"]
        self._set({"rows": rows, "d": d, "qkv_width": shape.qkv})
        self._set({name: int(getattr(shape, name)) for name in sizes})
        self._set({"eps": struct.unpack("<I", struct.pack("<f", shape.eps))[0]})
        self._step = cpu.kernel("decode_step")

    def fits(self, rows: int, slots: int) -> bool:
        """Return whether a step of these sizes has space here."""
        return (rows, torch.get_num_threads()) == (self._rows, self._threads) and slots <= self._slots

    def run(self, **args: int) -> None:
        """Run one step over a cache."""
        self._set(args)
        self._step(self._args)

    def _set(self, args: dict[str, int]) -> None:
        for name, value in args.items():
            self._args[self._places[name]] = value


def _vectors(block: StepBlock) -> list[int]:
    """Return the addresses of a block's vectors and router in C's order; 0: there is none."""
    recurrence, gate = block.recurrence, None if block.shared is None else block.shared[2]
    own: list[Tensor | None] = [None] * 4
    if recurrence is not None:
        own = [recurrence.convolution, recurrence.speed, recurrence.bias, recurrence.norm]
    found = (*block.norms, block.qkv_bias, block.qk_norm, block.router, gate, *own)
    return [0 if vector is None else vector.data_ptr() for vector in found]


@cache
def _fields() -> tuple[str, ...]:
    """Return the names of the kernel's arguments behind the number of threads, as C declares them."""
    names = cpu.loaded("qwenq_step_fields").handle.qwenq_step_fields
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split())
