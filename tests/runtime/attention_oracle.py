"""Attention in float64, and a backend put to it over a real cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.runtime.attention import Attention
from qwenq.runtime.cache import KVCache

CPU = torch.device("cpu")
CAPACITY = 200

SPANS: dict[str, tuple[list[int], list[int]]] = {
    "prompt": ([0], [70]),
    "one-token-prompt": ([0], [1]),
    "prompts-alike": ([0, 0], [6, 6]),
    "prompt-ragged": ([0, 0], [5, 19]),
    "prefix": ([64], [9]),
    "prefix-ragged": ([3, 66], [7, 2]),
    "prefix-ragged-to-the-end": ([195, 60], [5, 1]),
    "step": ([129], [1]),
    "step-ragged": ([5, 150, 63], [1, 1, 1]),
}
"""Tokens in each row of the cache before, and new ones."""


def exact(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Float64 [heads, tokens, d] of one row; query t sees the slots 0 … start + t."""
    end, group = start + queries.shape[1], queries.shape[0] // keys.shape[0]
    keys, values = (x[:, :end].double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = queries.double() @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5
    hidden = torch.arange(end) > start + torch.arange(queries.shape[1]).unsqueeze(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values


def error(
    backend: Attention,
    dtype: torch.dtype,
    heads: tuple[int, int],
    d: int,
    before: list[int],
    counts: list[int],
) -> float:
    """The largest difference from float64, over one and the number's size; inf where one is not finite."""
    generator = torch.Generator().manual_seed(len(before) + sum(counts))
    rows, tokens = len(before), max(counts)
    cache = KVCache(1, rows, heads[1], CAPACITY, d, CPU, dtype)
    keys, values = (
        torch.randn(rows, heads[1], CAPACITY + tokens, d, generator=generator).to(dtype) for _ in "kv"
    )
    if any(before):
        past = max(before)
        cache.write(0, keys[:, :, :past], values[:, :, :past], cache.span(before))
        cache.advance(before)
    span = cache.span(counts)
    queries = torch.randn(rows, heads[0], tokens, d, generator=generator).to(dtype)
    new = [torch.stack([x[r, :, a : a + tokens] for r, a in enumerate(before)]) for x in (keys, values)]
    mixed = backend(queries, *cache.write(0, *new, span), span)
    assert mixed.shape == queries.shape
    assert mixed.dtype == dtype
    worst = 0.0
    for row, (start, count) in enumerate(zip(before, counts, strict=True)):
        wanted = exact(queries[row, :, :count], keys[row], values[row], start)
        found = mixed[row, :, :count].double()
        difference = ((found - wanted).abs() / (1 + wanted.abs())).max().item()
        worst = max(worst, difference if torch.isfinite(found).all() else float("inf"))
    return worst
