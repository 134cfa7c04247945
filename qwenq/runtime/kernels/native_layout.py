"""What compiled code and Python agree on: sizes, and what lies where. Without llvmlite.

Everything that is told is a 64-bit integer: a number, or an address.
"""

from __future__ import annotations

from dataclasses import dataclass

OUTPUTS = 32
"""Of a layer, side by side in its weights: a block."""

LAYER = ("weights", "scales", "columns", "blocks", "group_size")
"""What a linear layer tells: two addresses and three sizes."""

STRETCH = 256
"""Slots of a cache that attention takes together."""


def activation_bytes(rows: int, columns: int, group_size: int) -> int:
    """Bytes of rows in 16 bits: high bytes, low bytes, and for each group a scale and a sum."""
    return rows * (2 * columns + 8 * (columns // group_size))


def part_floats(head_dim: int) -> int:
    """Float32 of what attention makes of a stretch: values mixed, the largest score, the sum of powers."""
    return head_dim + 2


LINEARS = ("qkv", "out", "gate_up", "down")
VECTORS = ("attention_norm", "mlp_norm", "qkv_bias", "qk_norm")
"""Float32, each an address; what a model does not have is 0."""

BLOCK = tuple(f"{linear}.{field}" for linear in LINEARS for field in LAYER) + VECTORS
"""What a block of the decoder tells, 64 bits each."""

JOB = (
    "x", "workspace",  # float32 [all rows, hidden], the residual stream; `activation_bytes` of the widest
    "qkv", "mixed", "gate_up",  # float32, what linears read and write, one row behind the other
    "blocks",  # BLOCK of all of them
    "scores", "parts", "splits",  # float32, see native_split; stretches that the longest row reaches into
    "cos", "sin", "rotation_stride",  # float32 [rows or 1, heads + key/value heads, d]; from row to row
    "keys", "values", "slots",  # float32 [layers, rows, heads, d, slots] and [layers, rows, heads, slots, d]
    "layer_stride",  # numbers from layer to layer of both: there may be rows that are not used any more
    "positions", "rows", "chunks",  # int64 [rows]; how many there are; of Shape.rows each, the last filled up
    "norm", "y",  # float32 [hidden]; bfloat16 [rows, hidden]
)  # fmt: skip
"""What a step is told, 64 bits each."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        rows: in a chunk: their sums are kept in registers while weights are read.
        bits, scales: of the weights, see ``native_vnni.product``.
        has_bias, has_qk_norm: whether q, k and v have a bias; whether q and k are normalised.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rows: int
    bits: int
    scales: str
    has_bias: bool
    has_qk_norm: bool
