"""Which attention blocks run as a whole text passes them: compiled code where this CPU can, else torch's."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenq.native import support

TORCH, NATIVE = "sdpa", "qwenq_causal"


def attention_of(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name under which transformers knows it."""
    if device.type != "cpu" or dtype != torch.bfloat16 or head_dim % 16 or support.why_not(*support.BFLOAT16):
        return TORCH
    _register()
    return NATIVE


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NATIVE, _attend)
    AttentionMaskInterface.register(NATIVE, sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """[batch, heads, tokens, d] each → [batch, tokens, heads, d]; with a mask, as of a window, torch's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from qwenq.models.native_attention import causal_attention

    if attention_mask is not None or query.shape[2] != key.shape[2]:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale), None
