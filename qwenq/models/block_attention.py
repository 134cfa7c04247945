"""Which attention blocks run as a whole text passes them: compiled code where this CPU can, else torch's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenq.native import support

TORCH, NATIVE = "sdpa", "qwenq_causal"
"""The names under which transformers knows them."""

HEAD_STEP = 16
"""Compiled code takes heads whose width is a multiple of this."""


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why attention is not compiled for this CPU, in words that follow "because"; None: it is."""
    if device.type != "cpu":
        return f"compiled attention is for CPUs, not for {device.type}"
    if head_dim % HEAD_STEP:
        return f"the width of a head, {head_dim}, is no multiple of {HEAD_STEP}"
    return support.why_not_multiply(dtype)


def passed_over(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """A sentence on compiled attention that blocks go without; None: they have it, or none is made for them.

    On a GPU and in float16 torch's is what there is: nothing is missed.
    """
    if device.type != "cpu" or dtype not in support.FEATURES:
        return None
    why = why_not(device, dtype, head_dim)
    return f"attention is left to torch, which takes longer, because {why}" if why else None


def attention_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """``NATIVE``, made known to transformers, or ``TORCH`` where ``why_not`` has a reason."""
    if why_not(device, dtype, head_dim) is not None:
        return TORCH
    _register()
    return NATIVE


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NATIVE, attend)
    AttentionMaskInterface.register(NATIVE, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """[batch, heads, tokens, d] each → [batch, tokens, heads, d]; with a mask, as of a window, torch's.

    Args:
        module: asked by torch's for ``num_key_value_groups`` and ``is_causal``.
        query, key, value: fewer heads of keys and values are shared evenly.
        attention_mask: None: each token sees those up to its own.
        scaling: of the scores; None: by the width of a head.
        rest: what else transformers tells; for torch's.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from qwenq.models.native_attention import causal_attention

    if attention_mask is not None or query.shape[2] != key.shape[2]:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale), None
