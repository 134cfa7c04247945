"""Attention over the cache: one function, so that another backend is one other function."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwenq.runtime.cache import Span


def attend(queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """Softmax attention, scaled by 1 / sqrt(d), query heads in groups that share a key/value head.

    Args:
        queries: [batch, heads, tokens, d].
        keys, values: [batch, key/value heads, end, d], the cache's slots.
        span: which slots each query may see.

    Returns:
        [batch, heads, tokens, d].
    """
    batch, heads, tokens, d = queries.shape
    shared = keys.shape[1]
    if span.causal and tokens == span.end:
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=heads != shared)
    if tokens == 1:
        # One query per head: the heads of a group are queries of one product, and no key is repeated.
        grouped = queries.view(batch, shared, heads // shared, d)
        mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=span.mask)
        return mixed.view(batch, heads, 1, d)
    return scaled_dot_product_attention(
        queries, keys, values, attn_mask=span.mask, enable_gqa=heads != shared
    )
