"""Describe the kinds of blocks of a model: their linear layers, what stays unquantised, their state.

A block is attention (of all earlier tokens, or linear with a recurrent state) and an MLP (dense, or a mixture
of experts). Both are data; no model has a class of its own. Experts are one ``Linear`` with a count. No torch
is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

AUTOMATIC_BITS = {r"^linear_attn\.": 8}
"""Bits of modules where the recipe says "auto": a recurrent state carries an error from token to token."""

ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
"""Modules that GPUs share along their inputs, each with whole groups; all others along their outputs."""


def unshared_heads(gpus: int, heads: int, kv_heads: int, recurrent: Iterable[int]) -> list[str]:
    """Return the kinds of heads that ``gpus`` GPUs cannot share; ``recurrent``: counts of linear attention.

    Heads are split evenly; key/value heads, where there are fewer than GPUs, are replicated evenly.
    """
    found = [f"{heads} heads"] if heads % gpus else []
    if kv_heads % gpus and gpus % kv_heads:
        found.append(f"{kv_heads} key/value heads")
    return found + [f"{count} heads of linear attention" for count in sorted(set(recurrent)) if count % gpus]


def splits_groups(columns: int, group_size: int, gpus: int) -> bool:
    """Return whether GPUs that share the inputs of a ``ROW_PARALLEL`` module would get parts of groups."""
    return columns % gpus != 0 or (group_size != -1 and columns // gpus % group_size != 0)


Tensors = tuple[tuple[str, tuple[int, ...]], ...]
"""Names, relative to the block, and shapes."""
NOTHING: Tensors = ()


@dataclass(frozen=True)
class Linear:
    """A linear module of a block: ``weight`` is [rows, columns] = [out, in]."""

    name: str  # relative to the block; ``{}`` stands for the number of the expert
    rows: int
    columns: int
    bias: bool
    copies: int = 1  # experts that have one each; 1: it is no expert's
    active: int = 1  # how many of the copies a token uses

    @property
    def elements(self) -> int:
        """Return the elements of one copy, bias included."""
        return self.rows * self.columns + (self.rows if self.bias else 0)

    @property
    def leaf(self) -> str:
        """Return the last part of its name."""
        return self.name.rpartition(".")[2]

    def names(self) -> Iterator[str]:
        """Yield the name of each copy."""
        yield from (self.name.format(number) for number in range(self.copies))

    def bits(self, common: int) -> int:
        """Return the bits that ``quantize`` gives it where the model's are ``common``."""
        own = (bits for pattern, bits in AUTOMATIC_BITS.items() if re.search(pattern, self.name))
        return max(common, next(own, common))


@dataclass(frozen=True)
class Experts:
    """A mixture of experts."""

    count: int  # experts of a block
    active: int  # how many of them a token is routed to
    width: int  # of one expert
    shared_width: int = 0  # of the expert that every token uses; 0: there is none
    dense_layers: tuple[int, ...] = ()  # layers that have a dense MLP all the same

    def distinct(self, tokens: int) -> float:
        """Return how many experts that many tokens use, if each chooses evenly and on its own."""
        return self.count * (1 - (1 - self.active / self.count) ** tokens)


@dataclass(frozen=True)
class LinearAttention:
    """Attention with a recurrent state (gated delta rule), behind a short convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # width of the convolution
    fused: bool  # queries, keys, values and output gate are one linear layer (Qwen3-Next)

    @property
    def channels(self) -> int:
        """Return the channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.values

    @property
    def values(self) -> int:
        """Return the width of all values."""
        return self.value_heads * self.value_dim

    def state_bytes(self, itemsize: int) -> int:
        """Return the bytes of one sequence's state in a layer; the recurrent part is float32."""
        return self.channels * self.kernel * itemsize + self.value_heads * self.key_dim * self.value_dim * 4

    def linears(self, hidden: int) -> tuple[Linear, ...]:
        """Return the linear layers that are quantised."""
        qkv, z = self.channels, self.values
        parts = {"in_proj_qkvz": qkv + z} if self.fused else {"in_proj_qkv": qkv, "in_proj_z": z}
        inputs = (Linear(f"linear_attn.{name}", rows, hidden, False) for name, rows in parts.items())
        return (*inputs, Linear("linear_attn.out_proj", hidden, z, False))

    def kept(self, hidden: int) -> Tensors:
        """Return the tensors that are not quantised."""
        heads = self.value_heads
        parts = {"in_proj_ba": 2 * heads} if self.fused else {"in_proj_b": heads, "in_proj_a": heads}
        return (
            *((f"linear_attn.{name}.weight", (rows, hidden)) for name, rows in parts.items()),
            ("linear_attn.conv1d.weight", (self.channels, 1, self.kernel)),
            ("linear_attn.A_log", (heads,)),
            ("linear_attn.dt_bias", (heads,)),
            ("linear_attn.norm.weight", (self.value_dim,)),
        )

    @property
    def float32_parameters(self) -> int:
        """Return the elements of a layer's ``A_log`` and ``norm``, which some files store in float32."""
        return self.value_heads + self.value_dim


@dataclass(frozen=True)
class Block:
    """One kind of block."""

    layers: tuple[int, ...]  # which layers of the model are of this kind
    linears: tuple[Linear, ...]  # that are quantised
    kept: Tensors  # that are not, biases of the linears aside
    attends: bool  # to all earlier tokens, whose keys and values it keeps; else it has a recurrent state

    @property
    def parameters(self) -> int:
        """Return the elements of one block."""
        return sum(linear.elements * linear.copies for linear in self.linears) + self._kept

    @property
    def active_parameters(self) -> int:
        """Return the elements that one token uses."""
        return sum(linear.elements * linear.active for linear in self.linears) + self._kept

    @property
    def _kept(self) -> int:
        return sum(prod(shape) for _, shape in self.kept)

    def solved_groups(self) -> Iterator[tuple[int, int, int, float]]:
        """Yield rows and columns of the linears that share an input, taken together; of an expert's once.

        With them the number of copies, and the share of the tokens that each copy sees.
        """
        groups: dict[tuple[str, bool], list[Linear]] = {}
        for linear in self.linears:
            key = (linear.name.rpartition(".")[0], linear.leaf in ROW_PARALLEL)
            groups.setdefault(key, []).append(linear)
        for linears in groups.values():
            one = linears[-1]
            rows = sum(linear.rows for linear in linears)
            yield rows, one.columns, one.copies, one.active / one.copies

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the tensors of the unquantised block, relative to it."""
        for linear in self.linears:
            for name in linear.names():
                yield f"{name}.weight", (linear.rows, linear.columns)
                if linear.bias:
                    yield f"{name}.bias", (linear.rows,)
        yield from self.kept


def mlp_linears(prefix: str, hidden: int, width: int, *, bias: bool = False) -> tuple[Linear, ...]:
    """Return the linear layers of a gated MLP."""
    return (
        Linear(f"{prefix}.gate_proj", width, hidden, bias),
        Linear(f"{prefix}.up_proj", width, hidden, bias),
        Linear(f"{prefix}.down_proj", hidden, width, bias),
    )


def mixture_linears(experts: Experts, hidden: int) -> tuple[Linear, ...]:
    """Return the linear layers of a mixture of experts that are quantised."""
    one = mlp_linears("mlp.experts.{}", hidden, experts.width)
    routed = tuple(replace(linear, copies=experts.count, active=experts.active) for linear in one)
    if not experts.shared_width:
        return routed
    return (*routed, *mlp_linears("mlp.shared_expert", hidden, experts.shared_width))


def mixture_kept(experts: Experts, hidden: int) -> Tensors:
    """Return the tensors of a mixture of experts that are not quantised: its routers."""
    router = ("mlp.gate.weight", (experts.count, hidden))
    return (router, ("mlp.shared_expert_gate.weight", (1, hidden))) if experts.shared_width else (router,)


def distinct_linears(blocks: Iterable[Block]) -> tuple[Linear, ...]:
    """Return the linear layers of all kinds of blocks, each name once."""
    return tuple({linear.name: linear for block in blocks for linear in block.linears}.values())


_VISION = (
    *("depth", "hidden_size", "intermediate_size", "out_hidden_size", "patch_size"),
    *("temporal_patch_size", "in_channels", "spatial_merge_size", "num_position_embeddings"),
)


def vision_parameters(config: Mapping[str, Any]) -> int | None:
    """Return the elements of the vision tower of Qwen3-VL, Qwen3.5 and later; None: a size is missing."""
    sizes, deep = [config.get(key) for key in _VISION], config.get("deepstack_visual_indexes") or ()
    if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(deep, Sequence):
        return None
    depth, width, ffn, out, patch, frames, colours, merged, positions = (int(size or 0) for size in sizes)
    block = 3 * width * width + 3 * width + width * width + width + 2 * width * ffn + ffn + width + 4 * width
    embedding = width * colours * frames * patch * patch + width + positions * width
    inner = merged * merged * width

    def merger(normed: int) -> int:
        return 2 * normed + inner * inner + inner + inner * out + out

    return depth * block + embedding + merger(width) + len(deep) * merger(inner)
