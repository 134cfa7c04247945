"""One decode step on the CPU: the decoder's forward pass for a single new token per row.

A small model spends as long between two products as in them, so a step has few calls: its views of the cache
are made at once for all layers, nothing is masked that need not be, and each RMSNorm is one call. It computes
what ``Decoder.forward`` computes, with attention in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from qwenq.runtime.attention.grouped_decode import mix
from qwenq.runtime.cache import KVCache
from qwenq.runtime.rope import logn_scales
from qwenq.runtime.step_layout import Step

if TYPE_CHECKING:
    from qwenq.runtime.decoder import Block, Decoder


class RMSNorm:
    """RMSNorm as one call of LayerNorm, torch's fused kernel: over (x, -x) the mean is zero.

    Args:
        weight: [hidden].
        eps: added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = torch.cat([weight, torch.zeros_like(weight)])
        self._shape, self._hidden, self._eps = (2 * len(weight),), len(weight), eps

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, hidden] → [batch, hidden], contiguous."""
        doubled = torch.cat((x, torch.neg(x)), 1)
        normed = torch.native_layer_norm(doubled, self._shape, self._weight, None, self._eps)[0]
        return normed.narrow(1, 0, self._hidden).contiguous()


class DecodeStep:
    """A decoder's blocks, ready for one new token per row.

    Args:
        decoder: on the CPU.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, shape, eps = decoder, decoder.spec.shape, decoder.spec.eps
        self._heads, self._shared, self._d = shape.heads, shape.kv_heads, shape.head_dim
        self._norms = [
            (RMSNorm(block.attention_norm, eps), RMSNorm(block.mlp_norm, eps)) for block in decoder.blocks
        ]
        self._final_norm = RMSNorm(decoder.norm, eps)
        scales = torch.ones(shape.heads + shape.kv_heads, 1)
        scales[: shape.heads] = shape.head_dim**-0.5
        self._scales = scales  # of attention's scores, folded into the rotation of the queries

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Int64 [batch] → [batch, hidden] after the final norm; each row of the cache becomes one longer.

        Raises:
            UsageError: a row is full.
        """
        step = cache.step()
        cos, sin = self.rotation(cache)
        x = embedding(ids, self._decoder.embedding)
        for layer, (block, norms) in enumerate(zip(self._decoder.blocks, self._norms, strict=True)):
            x = x + self._attention(norms[0](x), block, layer, cache, step, cos, sin)
            gate, up = block.gate_up(norms[1](x)).chunk(2, dim=1)
            x = x + block.down(silu(gate).mul_(up))
        cache.advance([1] * cache.batch)
        return self._final_norm(x)

    def _attention(
        self, x: Tensor, block: Block, layer: int, cache: KVCache, step: Step, cos: Tensor, sin: Tensor
    ) -> Tensor:
        batch, heads, shared, d = x.shape[0], self._heads, self._shared, self._d
        qkv = block.qkv(x).float().view(batch, heads + 2 * shared, d)
        qk = qkv[:, : heads + shared]
        if block.qk_norm is not None:
            variance = qk.square().mean(-1, keepdim=True).add_(self._decoder.spec.eps)
            qk = qk * variance.rsqrt_() * block.qk_norm
        swapped = qk.view(batch, heads + shared, 2, d // 2).flip(2).view(batch, heads + shared, d)
        rotated = (qk * cos).addcmul_(swapped, sin)
        cache.write_step(layer, rotated[:, heads:], qkv[:, heads + shared :], step)
        queries = rotated[:, :heads].reshape(batch * shared, heads // shared, d)
        mixed = mix(queries, step.keys[layer], step.values[layer], step.mask)
        return block.out(mixed.view(batch, heads * d).to(x.dtype))

    def rotation(self, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, float32 [batch or 1, heads + key/value heads, d], queries scaled."""
        positions, end = cache.next_positions(), max(cache.lengths) + 1
        cos, sin = self._decoder.rope.at(positions, cache.alphas, end)  # [batch or 1, 1, 1, d]
        scales, context = self._scales, self._decoder.spec.long_context
        if context is not None and context.logn and end > context.seq_length:
            longer = logn_scales(positions, context.seq_length)[..., None]  # [batch or 1, 1, 1]
            scales = scales.repeat(len(longer), 1, 1)
            scales[:, : self._heads] *= longer
        return cos[:, 0].float() * scales, sin[:, 0].float() * scales
