"""Time a prompt; and estimate, before it is begun, how long a long one will take.

A prompt cannot be stopped half way. Where a budget limits a point, pieces of a long prompt are timed first,
each twice as long as the one before: what a token takes by itself, and what it takes for each token before
it, follow from the last two.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qwenq.profiling.bandwidth import cache_bytes, synchronise

if TYPE_CHECKING:
    from qwenq.profiling.measure import Bench

LONG = 4096
"""Tokens from which a prompt is estimated first, where there is a limit."""
_FIRST, _LARGEST_SHARE = 256, 16
"""Tokens of the first piece; the last piece is at most one sixteenth of the prompt."""
_TRIAL = 0.02
"""Share of the remaining time after which only one more piece is timed: it takes 2 to 4 times as long."""


def prefill(bench: Bench, tokens: int | None = None) -> float:
    """Return the seconds from the prompt, or its first ``tokens``, to its first new token."""
    prompt = bench.prompt[:tokens]
    cache = bench.engine.new_cache(1, len(prompt) + 1)
    synchronise(bench.engine.device)
    start = time.perf_counter()
    bench.engine.prefill([prompt], cache).argmax(-1).tolist()
    seconds = time.perf_counter() - start
    bench.cache_bytes = cache_bytes(cache)
    return seconds


def too_long(bench: Bench) -> str:
    """Return why the point's prompt is not begun; empty where it fits the time limit."""
    tokens = bench.point.context
    if bench.allowance.seconds is None or tokens < LONG:
        return ""
    prefill(bench, _FIRST)  # warm-up
    made = [(_FIRST, prefill(bench, _FIRST))]
    while len(made) < 2 or (
        made[-1][0] * _LARGEST_SHARE <= tokens and made[-1][1] < bench.allowance.left(_TRIAL)
    ):
        longer = 2 * made[-1][0]
        made.append((longer, prefill(bench, longer)))
    seconds, left = estimated(tokens, *made[-2:]), bench.allowance.left()
    if seconds <= left:
        return ""
    return f"one prompt takes about {seconds:.0f} s, and its share of the budget leaves {left:.0f} s"


def estimated(tokens: int, short: tuple[int, float], longer: tuple[int, float]) -> float:
    """Return the seconds of n tokens as a · n + b · n² by (tokens, seconds) of two shorter prompts; b ≥ 0."""
    (n, s), (m, t) = short, longer
    squared = max(0.0, (t / m - s / n) / (m - n))  # t / m = a + b · m
    return (t / m + squared * (tokens - m)) * tokens
