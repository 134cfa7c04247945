"""Compute causal attention over several queries of a sequence, as prompts and whole texts have it.

The C kernel (``csrc/attention.c``) takes bfloat16 and float32 heads whose width is a multiple of 16;
elsewhere torch's ``scaled_dot_product_attention`` runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qwenq.compute import block, cpu

_WIDTH_STEP = 48
"""Packed keys and scores have room for a multiple of so many: a multiple of every variant's tile of keys."""

_QUERIES = 8  # rows of a tile, at most, of all variants


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why attention is torch's, in words that follow "because"; None: the C kernel runs."""
    return block.unsupported_reason(device, dtype, {"a head": head_dim})


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
    """Return each query's weighted sum of the values up to its own, [batch, tokens, heads, d].

    Args:
        q: [batch, heads, tokens, d].
        k, v: [batch, kv_heads, slots, d]; kv_heads divides heads.
        scale: of the scores, above zero.
        starts: int64 [batch], the slot of each row's first query; query t sees slots 0 … start + t, of those
            that there are. None: a query for every slot.
    """
    _check(q, k, v, scale)
    _check_starts(starts, q, k)
    (batch, heads, tokens, d), (kv_heads, slots) = q.shape, k.shape[1:3]
    if not q.numel() or unsupported_reason(q.device, q.dtype, d) is not None:
        return _reference(q, k, v, scale, starts)
    starts = torch.zeros(batch, dtype=torch.int64) if starts is None else starts.contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    width = -(-slots // _WIDTH_STEP) * _WIDTH_STEP
    out = torch.empty(batch, tokens, heads, d, dtype=q.dtype)
    keys, values = (torch.empty(batch * kv_heads * width * d) for _ in range(2))
    per_thread = _QUERIES * (2 * width + d)  # scores, powers, queries
    scratch = torch.empty(torch.get_num_threads() * per_thread)
    sizes = 4 * per_thread, width, batch, heads, kv_heads, tokens, slots, d
    strides = (stride for x in (q, k, v) for stride in x.stride()[:3])
    tensors = q, k, v, starts, out, keys, values, scratch
    cpu.call("causal_attention", cpu.DTYPE_CODES[q.dtype], *tensors, *sizes, float(scale), *strides)
    return out


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    seen = None
    if starts is not None:
        steps, slots = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
        seen = (slots <= (starts[:, None] + steps)[..., None]).unsqueeze(1)  # [batch, 1, tokens, slots]
    shared = q.shape[1] != k.shape[1]
    mixed = scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=shared
    )
    return mixed.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}, not [batch, heads, tokens, d] "
                f"of {q.dtype} on {q.device}, as q is"
            )
    (batch, heads, _, d), (kv_heads, slots) = q.shape, k.shape[1:3]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} of keys and values evenly")
    if not k.shape == v.shape == (batch, kv_heads, slots, d):
        shapes = (list(x.shape) for x in (q, k, v))
        raise ValueError("q is {}, so k {} and v {} do not fit".format(*shapes))
    if not scale > 0:
        raise ValueError(f"the scale of the scores is {scale}, not above zero")


def _check_starts(starts: Tensor | None, q: Tensor, k: Tensor) -> None:
    batch, tokens, slots = len(q), q.shape[2], k.shape[2]
    if starts is None:
        if tokens != slots:
            raise ValueError(f"{tokens} queries and {slots} keys do not fit without starts")
    elif starts.dtype != torch.int64 or starts.device != q.device or starts.shape != (batch,):
        raise ValueError(
            f"starts are {starts.dtype} {list(starts.shape)} on {starts.device}, "
            f"not int64 [{batch}] on {q.device}"
        )
    elif batch and q.device.type == "cpu" and not 0 <= int(starts.min()) <= int(starts.max()) < slots:
        raise ValueError(f"queries start at {starts.tolist()}; there are {slots} slots")
