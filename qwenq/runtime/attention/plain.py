"""Compute attention without packages or GPUs: ``off``, torch's ``sdpa``, a CPU's ``grouped``.

Query heads h share key/value head h // group. All scores are scaled by 1 / sqrt(d).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwenq.compute import cpu
from qwenq.compute.attention import causal_attention, unsupported_reason
from qwenq.compute.block import STEP
from qwenq.errors import UnsupportedError
from qwenq.runtime.cache import Span


class Attention(Protocol):
    """Softmax attention over the cache's slots."""

    name: str  # ``v2``, ``v1``, ``off``, ``sdpa``, ``split``, ``grouped`` or ``best``
    implementation: str  # exactly what runs, with package and version, for the row of a table

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """Return the mix of the values that each query may see, [batch, heads, tokens, d].

        Args:
            queries: [batch, heads, tokens, d]; what comes of a shorter row's padding is meaningless.
            keys, values: [batch, key/value heads, end, d], the cache's slots 0 … end-1, of any strides.
            span: which slots each query may see: those up to its own position.
        """
        ...


def refused(name: str, why: str, hint: str) -> UnsupportedError:
    """Return the error of a backend that cannot run here."""
    return UnsupportedError(f"attention {name}: {why}", where=f"--attention {name}", hint=hint)


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
    """No fused kernel: matrix product, softmax in float32, matrix product.

    With ``softcap`` scores become softcap · tanh(score / softcap).
    """

    name = "off"

    def __init__(self, softcap: float | None = None) -> None:
        self._softcap = softcap
        self.implementation = f"matmul, float32 softmax, matmul (torch {torch.__version__})"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        batch, heads, tokens, d = queries.shape
        shared, end = keys.shape[1:3]
        rows = queries.reshape(batch, shared, heads // shared * tokens, d)  # a group's heads in a row
        scores = (rows @ keys.transpose(-1, -2)).float() * d**-0.5  # [batch, shared, group · tokens, end]
        scores = scores.view(batch, shared, heads // shared, tokens, end)
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
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


# Compute attention on a CPU: decode steps by one batched product per group of heads, prompts by C.
#
# In a decode step query heads that share a key/value head are rows of one product over keys kept
# transposed, so no key is read twice. `StepOperations` has a cache arranged for it (see
# ``KVCache.step``); any other cache is brought to that form first. Prompts are ``compute.attention``'s.


class GroupedDecode:
    """``compute.attention`` for prompts; for the one query of a decode step, products in float32."""

    name = "grouped"
    has_step_layout = True  # whether the fast engine's decode steps read the cache in their layout

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cpu":
            raise refused(
                self.name,
                f"it is laid out for a CPU, and this is a {device.type}",
                "use --attention split, v2 or sdpa",
            )
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
    """Return softmax attention of one step, float32 [batch · key/value heads, heads of a group, d].

    Args:
        queries: of that shape, scaled.
        keys: [batch · key/value heads, d, end].
        values: [batch · key/value heads, end, d].
        mask: [batch · key/value heads, 1, end], added to the scores; None: everything is seen.
    """
    scores = torch.bmm(queries, keys) if mask is None else torch.baddbmm(mask, queries, keys)
    return torch.bmm(torch.softmax(scores, dim=-1), values)
