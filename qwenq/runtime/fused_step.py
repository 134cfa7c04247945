"""All blocks of a decode step on a GPU, with what lies between the products in kernels of our own.

The same arithmetic as `Decoder.run` over one token a row, of which it takes the place in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import embedding

from qwenq.compute.gpu import unsupported_reason
from qwenq.runtime.cache import KVCache
from qwenq.runtime.span import Span

if TYPE_CHECKING:
    from qwenq.runtime.decoder import Decoder


def why_not_fused(decoder: Decoder) -> str | None:
    """Why these kernels cannot run where the decoder does, in words that follow "because"; None: they can."""
    return unsupported_reason(decoder.device)


def run_fused(
    decoder: Decoder,
    ids: Tensor,
    cache: KVCache,
    span: Span,
    rotation: tuple[Tensor, Tensor],
    query_scales: Tensor | None,
) -> Tensor:
    """One token of each row through all blocks.

    Args:
        decoder: what runs.
        ids: int64 [batch].
        cache: written at ``span.positions``; its lengths stay as they are.
        span: of a step whose rows each have a position of their own.
        rotation: cosines and signed sines, [batch, d] each.
        query_scales: [batch], Qwen v1's logn factors, or None.

    Returns:
        [batch, hidden] after the final norm.
    """
    from qwenq.runtime.kernels.triton_step import add_norm, gated, rotate_and_store

    eps, batch = decoder.spec.eps, len(ids)
    positions = span.positions[:, 0]
    x, added = embedding(ids, decoder.embedding), None
    for layer, block in enumerate(decoder.blocks):
        normed = add_norm(x, added, block.attention_norm, eps)
        stored = cache.keys[layer], cache.values[layer]
        qkv = block.qkv(normed)
        queries = rotate_and_store(qkv, block.qk_norm, rotation, query_scales, positions, stored, eps)
        keys, values = (slots[:, :, : span.end] for slots in stored)
        mixed = decoder.attend(queries, keys, values, span)  # [batch, heads, 1, d]
        added = block.out(mixed.reshape(batch, -1))
        normed = add_norm(x, added, block.mlp_norm, eps)
        added = block.down(gated(block.gate_up(normed)))
    return add_norm(x, added, decoder.norm, eps)
