"""Run a decode step in one call: every block of a decoder for one new token in each row (``csrc/step.c``).

The reference is `StepOperations` of ``runtime.decode_step``, with a few hundred calls of torch; in a small
model these take longer than the products.
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
from qwenq.compute.linear import DTYPES, PackedWeights, activation_bytes

STRETCH = 256
"""Slots of a cache that attention takes together, as in C."""
MULTIPLE = 32
"""Of every width: halves of a head fill registers."""
MOST_HEAD_DIM = 256
_HEADS_AT_ONCE = 4
_EXPERTS_AT_ONCE = 16  # registers of any variant are filled


@dataclass(frozen=True)
class StepShape:
    """Sizes of a decoder.

    Attributes:
        ffn: the width of the dense MLPs; 0: there is none.
        head_dim: of a head.
        eps: of the norms.
        experts: of a mixture; 0: there is none.
        active: how many of them a row takes.
        expert_width: of one.
        normalised: whether their shares are made to add up to one.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    experts: int = 0
    active: int = 0
    expert_width: int = 0
    normalised: bool = False


@dataclass(frozen=True)
class StepBlock:
    """The weights of a block.

    Attributes:
        linears: qkv, out.
        mlps: gate_up, down; of a mixture, those of each expert, with the same sizes and group sizes.
        vectors: float32: attention_norm [hidden], mlp_norm [hidden], qkv_bias [(heads + 2 kv_heads) · d] or
            None, qk_norm [heads + kv_heads, d] or None.
        router: [experts, hidden], of the result's dtype; None: the block is no mixture.
    """

    linears: tuple[PackedWeights, PackedWeights]
    mlps: tuple[tuple[PackedWeights, PackedWeights], ...]
    vectors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    router: Tensor | None = None


def unsupported_reason(shape: StepShape) -> str | None:
    """Return why C cannot run such a step here, in words that follow "because"; None: it can."""
    if reason := cpu.unsupported_reason():
        return reason
    if any(width % MULTIPLE for width in (shape.head_dim, shape.hidden, shape.ffn, shape.expert_width)):
        return f"sizes are no multiples of {MULTIPLE}"
    if shape.head_dim > MOST_HEAD_DIM:
        return f"heads are wider than {MOST_HEAD_DIM}"
    return None


class DecodeStep:
    """A decoder's blocks, run by C. What a step writes to is kept for the next; one step runs at a time.

    Args:
        shape: sizes.
        blocks: the weights of each block.
        norm: float32 [hidden], the final norm.
        dtype: float32 or bfloat16, of the result.
    """

    def __init__(
        self, shape: StepShape, blocks: Sequence[StepBlock], norm: Tensor, dtype: torch.dtype
    ) -> None:
        self._shape, self._blocks, self._norm, self._dtype = shape, list(blocks), norm, dtype
        self._tables: list[Tensor] = []
        addresses = [[*_addresses(block.linears), *self._mlp(block)] for block in self._blocks]
        self._linears = torch.tensor(addresses, dtype=torch.int64)  # [layers, 4]
        pointers = [
            [0 if v is None else v.data_ptr() for v in (*block.vectors, block.router)]
            for block in self._blocks
        ]
        self._vectors = torch.tensor(pointers, dtype=torch.int64)  # [layers, 5]
        self._workspace: _Workspace | None = None
        self._alone = Lock()  # C lets other threads of Python run

    def _mlp(self, block: StepBlock) -> list[int]:
        """Return the addresses of gate_up and down; of a mixture, of a table of its experts' for each."""
        each = [_addresses(mlp) for mlp in block.mlps]
        if block.router is None:
            return each[0]
        table = torch.tensor(each, dtype=torch.int64).T.contiguous()  # [2, experts]
        self._tables.append(table)
        return [row.data_ptr() for row in table]

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """Return [rows, hidden] after the final norm; add keys and values of the new tokens to the cache.

        Args:
            x: [rows, hidden], the new tokens' embeddings.
            cos, sin: float32 [rows or 1, heads + kv_heads, d]; queries' are scaled, the first halves' sines
                negated.
            keys: float32 [layers, rows, kv_heads, d, slots]; slots a multiple of 16, at least 16 more than a
                row holds.
            values: float32 [layers, rows, kv_heads, slots, d].
            lengths: tokens of each row so far.

        Raises:
            ValueError: tensors of other shapes, dtypes or strides.
        """
        with self._alone:
            return self._run(x, cos, sin, keys, values, lengths)

    def _run(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        rows, slots = len(x), keys.shape[-1]
        self._check(x, cos, sin, keys, values, lengths)
        held = self._workspace
        if held is None or not held.fits(rows, slots):
            held = self._workspace = _Workspace(
                self._shape, rows, slots, self._linears, self._vectors, self._norm
            )
        held.x.copy_(x)
        held.positions[:] = torch.tensor(lengths)
        y = torch.empty(rows, self._shape.hidden, dtype=self._dtype)
        held.run(
            cos=cos.data_ptr(), sin=sin.data_ptr(), rotation_stride=cos[0].numel() if len(cos) > 1 else 0,
            keys=keys.data_ptr(), values=values.data_ptr(), slots=slots, layer_stride=keys.stride(0),
            y=y.data_ptr(), dtype=DTYPES[self._dtype], splits=max(lengths) // STRETCH + 1,
        )  # fmt: skip
        return y

    def _check(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int]
    ) -> None:
        shape, rows = self._shape, len(x)
        slots, d = keys.shape[-1], shape.head_dim
        head = (shape.layers, rows, shape.kv_heads)
        rotated = (shape.heads + shape.kv_heads, d)
        fits = (
            x.shape == (rows, shape.hidden)
            and len(lengths) == rows
            and all(t.shape[1:] == rotated and len(t) in (1, rows) and t.is_contiguous() for t in (cos, sin))
            and len(cos) == len(sin)
            and keys.shape == (*head, d, slots)
            and values.shape == (*head, slots, d)
            and keys.stride() == (keys.stride(0), shape.kv_heads * d * slots, d * slots, slots, 1)
            and values.stride() == (keys.stride(0), shape.kv_heads * d * slots, d * slots, d, 1)
            and all(t.dtype is torch.float32 and t.device.type == "cpu" for t in (cos, sin, keys, values))
            and slots % 16 == 0
            and max(lengths) + 16 <= slots
        )
        if not fits:
            tensors = {"x": x, "cos": cos, "sin": sin, "keys": keys, "values": values}
            found = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in tensors.items())
            raise ValueError(f"{found} and lengths {list(lengths)} do not fit {shape}")


class _Workspace:
    """What a step of so many rows writes to, and its arguments.

    Args:
        shape: sizes.
        rows: of the batch.
        slots: of each row of the cache, at most.
        linears, vectors: addresses of each block, int64 [layers, 4] and [layers, 5].
        norm: float32 [hidden].
    """

    def __init__(
        self, shape: StepShape, rows: int, slots: int, linears: Tensor, vectors: Tensor, norm: Tensor
    ) -> None:
        self._rows, self._slots, threads = rows, slots, torch.get_num_threads()
        d, widest = shape.head_dim, max(shape.hidden, shape.ffn, shape.heads * shape.head_dim)
        pairs, likely = rows * shape.active, -(-shape.experts // _EXPERTS_AT_ONCE) * _EXPERTS_AT_ONCE
        activations = max(activation_bytes(rows, widest), activation_bytes(pairs, shape.expert_width))
        self.x = torch.zeros(rows, shape.hidden)
        self.positions = torch.zeros(rows, dtype=torch.int64)
        self._held = {
            "x": self.x,
            "positions": self.positions,
            "workspace": torch.zeros(activations, dtype=torch.uint8),
            "qkv": torch.zeros(rows, (shape.heads + 2 * shape.kv_heads) * d),
            "mixed": torch.zeros(rows, shape.heads * d),
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
        sizes = ("layers", "hidden", "heads", "kv_heads", "experts", "active", "normalised")
        self._set({"rows": rows, "d": d, **{name: int(getattr(shape, name)) for name in sizes}})
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


def _addresses(layers: Sequence[PackedWeights]) -> list[int]:
    return [layer.fields.data_ptr() for layer in layers]


@cache
def _fields() -> tuple[str, ...]:
    """Return the names of the kernel's arguments behind the number of threads, as C declares them."""
    library = cpu.library()
    assert isinstance(library, cpu.Library)  # noqa: S101  # unsupported_reason has been asked
    names = library.handle.qwenq_step_fields
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split())
