"""Measure at load which backend is fastest here: one for prompts, one for decode steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from qwenq.runtime.attention.grouped_decode import GroupedDecode
from qwenq.runtime.attention.plain import Attention
from qwenq.runtime.span import Span

HEADS, HEAD_DIM = 16, 128
"""Of the measurement: one layer of Qwen-1.8B."""
PROMPT, CONTEXT = 512, 2048
"""Tokens of the prompt, and slots that a decode step reads."""
_REPEATS = 3


class Autotuned:
    """The backends that were fastest for prompts and for decode steps.

    Args:
        candidates: backends that can run here.
        device, dtype: of the measurement.

    Attributes:
        seconds: of each candidate, by name: one prompt, one decode step.
        implementation: what was chosen, from what.
        has_grouped: whether ``grouped`` is a candidate: a decoder measures its whole steps with and without
            that, too, as they are what counts, and may call `take_whole_steps`.
    """

    name = "best"

    def __init__(self, candidates: Sequence[Attention], device: torch.device, dtype: torch.dtype) -> None:
        sizes = (PROMPT, PROMPT), (1, CONTEXT)
        self.seconds = {
            each.name: tuple(_measure(each, *size, device, dtype) for size in sizes) for each in candidates
        }
        self.has_grouped = GroupedDecode.name in self.seconds
        self._prefill, self._decode = (
            min(candidates, key=lambda each: self.seconds[each.name][which]) for which in range(2)
        )
        self.implementation = self._describe(f"{self._decode.name} ({self._decode.implementation})")

    def take_whole_steps(self, milliseconds: float, otherwise: float) -> None:
        """Note that decode steps are whole ones around ``grouped``, with the times of both ways."""
        measured = f"{milliseconds:.1f} ms; with {self._decode.name} {otherwise:.1f} ms"
        self.implementation = self._describe(f"{GroupedDecode.name} (whole steps: {measured})")

    def _describe(self, decode: str) -> str:
        chosen = f"prefill {self._prefill.name} ({self._prefill.implementation}), decode {decode}"
        return f"fastest measured at load among {', '.join(self.seconds)}: {chosen}"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        chosen = self._decode if queries.shape[2] == 1 else self._prefill
        return chosen(queries, keys, values, span)


def _measure(attention: Attention, tokens: int, end: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of one call, the shortest of a few after a first that builds what is built."""
    queries = torch.zeros(1, HEADS, tokens, HEAD_DIM, device=device, dtype=dtype)
    keys = torch.zeros(1, HEADS, end, HEAD_DIM, device=device, dtype=dtype)
    positions = torch.arange(end - tokens, end, device=device).unsqueeze(0)
    span = Span(positions, end - tokens, end, causal=tokens == end, mask=None)
    seconds = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        attention(queries, keys, keys, span)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
