"""Compute attention anywhere: written out (``off``), and by whatever torch picks (``sdpa``)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwenq.runtime.span import Span


class Attention(Protocol):
    """Softmax attention over the cache's slots."""

    name: str
    """Name of the backend: ``v2``, ``v1``, ``off``, ``sdpa``, ``split``, ``grouped`` or ``best``."""
    implementation: str
    """Exactly what runs, with package and version, for the row of a table."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """Mix the values that each query may see.

        Args:
            queries: [batch, heads, tokens, d].
            keys, values: [batch, key/value heads, end, d], the cache's slots 0 … end-1, of any strides.
            span: which slots each query may see: those up to its own position.

        Returns:
            [batch, heads, tokens, d]; meaningless in the padding of a shorter row.
        """
        ...


class Sdpa:
    """torch's ``scaled_dot_product_attention``; torch chooses the kernel, call by call."""

    name = "sdpa"

    def __init__(self) -> None:
        self.implementation = (
            f"torch {torch.__version__} scaled_dot_product_attention (torch picks the kernel)"
        )

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        return attend(queries, keys, values, span)


def attend(queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """Compute ``sdpa``; arguments and result are those of `Attention`."""
    batch, heads, tokens, d = queries.shape
    shared = keys.shape[1]
    if span.causal and tokens == span.end:
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=heads != shared)
    if tokens == 1:
        # One query per head: the heads of a group are queries of one product, and no key is repeated.
        grouped = queries.reshape(batch, shared, heads // shared, d)
        mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=span.mask)
        return mixed.reshape(batch, heads, 1, d)
    return scaled_dot_product_attention(
        queries, keys, values, attn_mask=span.mask, enable_gqa=heads != shared
    )


class Off:
    """No fused kernel: matrix product, softmax in float32, matrix product."""

    name = "off"

    def __init__(self) -> None:
        self.implementation = f"matmul, float32 softmax, matmul (torch {torch.__version__})"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        batch, heads, tokens, d = queries.shape
        shared, end = keys.shape[1:3]
        rows = queries.reshape(batch, shared, heads // shared * tokens, d)  # a group's heads in a row
        scores = (rows @ keys.transpose(-1, -2)).float() * d**-0.5  # [batch, shared, group · tokens, end]
        scores = scores.view(batch, shared, heads // shared, tokens, end)
        mask = visible(span, tokens)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
        weights = scores.softmax(dim=-1).to(values.dtype).view(batch, shared, heads // shared * tokens, end)
        mixed: Tensor = weights @ values
        return mixed.view(batch, heads, tokens, d)


def visible(span: Span, tokens: int) -> Tensor | None:
    """Return where queries may look, bool [batch or 1, 1, tokens, end]; None: everywhere."""
    if span.mask is not None or not span.causal or tokens == 1:
        return span.mask
    slots = torch.arange(span.end, device=span.positions.device)
    steps = torch.arange(tokens, device=span.positions.device)
    return (slots <= steps.unsqueeze(1)).view(1, 1, tokens, span.end)
