"""Compute attention on a CPU: decode steps by one batched product per group of heads, prompts by C.

In a decode step query heads that share a key/value head are rows of one product over keys kept
transposed, so no key is read twice. `StepOperations` has a cache arranged for it (see
``KVCache.step``); any other cache is brought to that form first. Prompts are ``compute.attention``'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.compute import cpu
from qwenq.compute.attention import causal_attention, unsupported_reason
from qwenq.compute.block import STEP
from qwenq.errors import UnsupportedError
from qwenq.runtime.span import Span


class GroupedDecode:
    """``compute.attention`` for prompts; for the one query of a decode step, products in float32.

    Args:
        dtype: of queries, keys and values.
    """

    name = "grouped"

    def __init__(self, dtype: torch.dtype) -> None:
        prompts = f"torch {torch.__version__} scaled_dot_product_attention"
        if unsupported_reason(torch.device("cpu"), dtype, STEP) is None:
            prompts = f"C for {cpu.variant_name()} (heads of no multiple of {STEP}: {prompts})"
        self.implementation = f"decode: batched products by key/value head in float32; prompts: {prompts}"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        batch, heads, tokens, d = queries.shape
        if tokens > 1:
            starts = None if span.causal and tokens == span.end else span.positions[:, 0].expand(batch)
            return causal_attention(queries, keys, values, d**-0.5, starts).transpose(1, 2)
        shared, end = keys.shape[1:3]
        mask = None
        if span.mask is not None:
            hidden = ~span.mask.expand(batch, shared, 1, end).reshape(batch * shared, 1, end)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        grouped = (queries.float() * d**-0.5).reshape(batch * shared, heads // shared, d)
        mixed = grouped_attention(
            grouped,
            keys.float().reshape(batch * shared, end, d).transpose(1, 2),
            values.float().reshape(batch * shared, end, d),
            mask,
        )
        return mixed.view(batch, heads, 1, d).to(queries.dtype)


def grouped_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax attention of one step, all float32.

    Args:
        queries: [batch · key/value heads, heads of a group, d], scaled.
        keys: [batch · key/value heads, d, end].
        values: [batch · key/value heads, end, d].
        mask: [batch · key/value heads, 1, end], added to the scores; None: everything is seen.

    Returns:
        [batch · key/value heads, heads of a group, d].
    """
    scores = torch.bmm(queries, keys) if mask is None else torch.baddbmm(mask, queries, keys)
    return torch.bmm(torch.softmax(scores, dim=-1), values)


def grouped(device: torch.device, dtype: torch.dtype) -> GroupedDecode:
    """Return the backend, on a CPU."""
    if device.type != "cpu":
        raise UnsupportedError(
            f"attention grouped: it is laid out for a CPU, and this is a {device.type}",
            where="--attention grouped",
            hint="use --attention split, v2 or sdpa",
        )
    return GroupedDecode(dtype)
