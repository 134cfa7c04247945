"""Run a decoder's blocks: the forward pass of a block, written once, over interchangeable operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn.functional import silu

from qwenq.compute import block as ops
from qwenq.runtime.attention.grouped_decode import grouped_attention
from qwenq.runtime.attention.plain import Attention
from qwenq.runtime.cache import KVCache
from qwenq.runtime.kernels.base import Linear
from qwenq.runtime.rope import Rope
from qwenq.runtime.span import Span
from qwenq.runtime.spec import DecoderSpec


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block.

    Attributes:
        qkv: hidden → (heads + 2 · key/value heads) · d.
        qk_norm: [heads + key/value heads, d], each head's RMSNorm weight (Qwen3), else None.
        gate_up: hidden → 2 · ffn.
    """

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Operations(Protocol):
    """What lies between the products of a block, for one pass of new tokens over a cache."""

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """Add to ``x`` in place, unless it is None, and return the RMSNorm of the sum."""
        ...

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, return the heads' mixed values.

        Args:
            qkv: [..., (heads + 2 · key/value heads) · d].
            qk_norm: see `Block`.
            layer: of the cache.

        Returns:
            [..., heads · d].
        """
        ...

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return ``silu(gate) · up``, [..., 2 · ffn] → [..., ffn]."""
        ...


def run_blocks(x: Tensor, blocks: Sequence[Block], norm: Tensor, operations: Operations) -> Tensor:
    """Run embedded tokens, [..., hidden], through all blocks and the final norm; ``x`` is overwritten."""
    added = None
    for layer, block in enumerate(blocks):
        normed = operations.add_norm(x, added, block.attention_norm)
        mixed = operations.attention(block.qkv(normed), block.qk_norm, layer)
        normed = operations.add_norm(x, block.out(mixed), block.mlp_norm)
        added = block.down(operations.gated(block.gate_up(normed)))
    return operations.add_norm(x, added, norm)


@dataclass
class PlainOperations:
    """Operations of ``compute.block`` over [batch, tokens, ...]; a graph can capture them.

    Attributes:
        attend: what mixes the cache's values.
        cache: written where ``span`` says; its lengths stay as they are.
        span: where the tokens go, and what they may see.
        rotation: cosines and sines, see ``Rope.at``.
        query_scales: Qwen v1's factors [batch or 1, tokens, 1, 1], or None.
        spec: sizes and constants.
    """

    attend: Attention
    cache: KVCache
    span: Span
    rotation: tuple[Tensor, Tensor]
    query_scales: Tensor | None
    spec: DecoderSpec

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See `Operations`."""
        return _add_norm(x, added, weight, self.spec.eps)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """See `Operations`."""
        batch, tokens, _ = qkv.shape
        heads, shared = self.spec.shape.heads, self.spec.shape.kv_heads
        qkv = qkv.view(batch, tokens, heads + 2 * shared, self.spec.shape.head_dim)
        qk, values = qkv[:, :, : heads + shared], qkv[:, :, heads + shared :]
        if qk_norm is not None:
            qk = ops.rms_norm(qk, qk_norm, self.spec.eps)
        rotated = ops.rotate(qk, *self.rotation)
        queries, keys = rotated[:, :, :heads], rotated[:, :, heads:]
        if self.query_scales is not None:
            queries = queries * self.query_scales
        keys, values = self.cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2), self.span)
        mixed = self.attend(queries.transpose(1, 2), keys, values, self.span)  # [batch, heads, tokens, d]
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        return ops.swiglu(*gate_up.chunk(2, dim=-1))


class StepOperations:
    """Operations of a decode step on a CPU, over [batch, ...], with attention in float32.

    A small model spends as long between two products as in them, so there are few calls: the views of the
    cache are made for all layers together, and only rows of unequal length are masked.

    Args:
        cache: gets one more token in each row; its lengths stay as they are.
        rope: rotates it.
        spec: sizes and constants.

    Raises:
        UsageError: a row is full.
    """

    def __init__(self, cache: KVCache, rope: Rope, spec: DecoderSpec) -> None:
        self._cache, self._shape, self._eps = cache, spec.shape, spec.eps
        self._step = cache.step()
        self._cos, self._sin = rope.at_step(self._step.positions, cache.alphas, self._step.end)

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See `Operations`."""
        return _add_norm(x, added, weight, self._eps)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """See `Operations`."""
        batch, heads, shared, d = len(qkv), self._shape.heads, self._shape.kv_heads, self._shape.head_dim
        dtype, step = qkv.dtype, self._step
        qkv = qkv.float().view(batch, heads + 2 * shared, d)
        qk = qkv[:, : heads + shared]
        if qk_norm is not None:
            variance = qk.square().mean(-1, keepdim=True).add_(self._eps)
            qk = qk * variance.rsqrt_() * qk_norm
        swapped = qk.view(batch, heads + shared, 2, d // 2).flip(2).view(batch, heads + shared, d)
        rotated = (qk * self._cos).addcmul_(swapped, self._sin)
        self._cache.write_step(layer, rotated[:, heads:], qkv[:, heads + shared :], step)
        queries = rotated[:, :heads].reshape(batch * shared, heads // shared, d)
        mixed = grouped_attention(queries, step.keys[layer], step.values[layer], step.mask)
        return mixed.view(batch, heads * d).to(dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        gate, up = gate_up.chunk(2, dim=1)
        return silu(gate).mul_(up)


def _add_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if added is not None:
        x += added
    return ops.rms_norm(x, weight, eps)
