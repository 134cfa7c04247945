"""Run what lies between the products of a decode step in three kernels: torch's would be fifteen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FFN_BLOCK = 1024  # features of the gated activation for one program


@triton.jit
def _add_norm(
    x: tl.tensor, y: tl.tensor, weight: tl.tensor, normed: tl.tensor, eps: tl.tensor,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
) -> None:  # fmt: skip
    """Compute one row."""
    features = tl.arange(0, BLOCK)
    inside = features < HIDDEN
    place = tl.program_id(0) * HIDDEN + features
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    if ADD:
        # Rounded as it is stored: what is normalised is what the next addition finds.
        total = (value + tl.load(y + place, inside, 0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + place, total, inside)
        value = total.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / HIDDEN + eps)
    value *= tl.load(weight + features, inside, 0.0).to(tl.float32)
    tl.store(normed + place, value.to(normed.dtype.element_ty), inside)


@triton.jit
def _rotate_and_store(
    qkv: tl.tensor, norm: tl.tensor, cos: tl.tensor, sin: tl.tensor, scales: tl.tensor, positions: tl.tensor,
    q: tl.tensor, keys: tl.tensor, values: tl.tensor, eps: tl.tensor,
    k_batch: tl.tensor, k_head: tl.tensor, k_slot: tl.tensor,
    v_batch: tl.tensor, v_head: tl.tensor, v_slot: tl.tensor,
    HEADS: tl.constexpr, SHARED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate one head of one row: a query goes to ``q``, a key or a value to its slot of the cache."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    features = tl.arange(0, BLOCK)
    inside = features < D
    other = (features + D // 2) % D  # the half of the pair that it is rotated with
    base = qkv + (batch * (HEADS + 2 * SHARED) + head) * D
    x = tl.load(base + features, inside, 0.0).to(tl.float32)
    position = tl.load(positions + batch)
    if head < HEADS + SHARED:
        swapped = tl.load(base + other, inside, 0.0).to(tl.float32)
        if NORM:
            inverse = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
            x *= inverse * tl.load(norm + head * D + features, inside, 0.0).to(tl.float32)
            swapped *= inverse * tl.load(norm + head * D + other, inside, 0.0).to(tl.float32)
        x = x * tl.load(cos + batch * D + features, inside, 0.0).to(tl.float32)
        x += swapped * tl.load(sin + batch * D + features, inside, 0.0).to(tl.float32)
        if head < HEADS:
            if SCALED:
                x *= tl.load(scales + batch).to(tl.float32)
            tl.store(q + (batch * HEADS + head) * D + features, x.to(q.dtype.element_ty), inside)
        else:
            place = batch * k_batch + (head - HEADS) * k_head + position * k_slot
            tl.store(keys + place + features, x.to(keys.dtype.element_ty), inside)
    else:
        place = batch * v_batch + (head - HEADS - SHARED) * v_head + position * v_slot
        tl.store(values + place + features, x.to(values.dtype.element_ty), inside)


@triton.jit
def _gated(gate_up: tl.tensor, product: tl.tensor, ffn: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Compute one block of one row."""
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = features < ffn
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gate_up + row * 2 * ffn + features, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * ffn + ffn + features, inside, 0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(product + row * ffn + features, value.to(product.dtype.element_ty), inside)


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add y to x in place, both [rows, hidden] and contiguous, and return the RMSNorm of the sum."""
    rows, hidden = x.shape
    normed = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_norm[(rows,)](
            x, x if y is None else y, weight, normed, eps,
            HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), ADD=y is not None, num_warps=8,
        )  # fmt: skip
    return normed


def rotate_and_store(
    qkv: Tensor,
    norm: Tensor | None,
    rotation: tuple[Tensor, Tensor],
    scales: Tensor | None,
    positions: Tensor,
    cache: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """Rotate the new token's queries and keys, and put its keys and values into the cache.

    Args:
        qkv: [batch, (heads + 2 · key/value heads) · d], contiguous.
        norm: [heads + key/value heads, d], each head's RMSNorm weight (Qwen3), or None.
        rotation: cosines and signed sines, [batch, d] each, contiguous; see `Rope.at`.
        scales: [batch], factors of the queries, or None.
        positions: int64 [batch], the slots that are written.
        cache: keys and values, [batch, key/value heads, slots, d]; d has stride 1.
        eps: of ``norm``.

    Returns:
        Queries, [batch, heads, 1, d].
    """
    keys, values = cache
    batch, shared, _, d = keys.shape
    heads = qkv.shape[1] // d - 2 * shared
    q = torch.empty(batch, heads, 1, d, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _rotate_and_store[(batch, heads + 2 * shared)](
            qkv, qkv if norm is None else norm, *rotation, qkv if scales is None else scales, positions,
            q, keys, values, eps, *keys.stride()[:3], *values.stride()[:3],
            HEADS=heads, SHARED=shared, D=d, BLOCK=triton.next_power_of_2(d),
            NORM=norm is not None, SCALED=scales is not None, num_warps=1,
        )  # fmt: skip
    return q


def gated(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) · up``, [rows, ffn], for contiguous [rows, 2 · ffn]."""
    rows, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(rows, ffn, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        _gated[(rows, triton.cdiv(ffn, _FFN_BLOCK))](gate_up, product, ffn, BLOCK=_FFN_BLOCK, num_warps=4)
    return product
