"""Capture whole decode steps of the fast engine in CUDA graphs: one launch instead of hundreds.

A graph replays the same kernels on the same addresses. So a step is written here with shapes that do not
depend on how far the rows are: tokens and positions lie in tensors of their own, the cache is read up to a
bound, and what a row may not see yet is masked. There is a graph for each bound, a power of two, made when
the rows first get there. `StaticStep` is the step, on any device; `Graphs` captures and replays it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qwenq.compute import gpu
from qwenq.runtime.block import Operations, TritonOperations
from qwenq.runtime.cache import KVCache, Span
from qwenq.runtime.decoder import Decoder
from qwenq.runtime.spec import logn_scales

SHORTEST = 256  # slots that the first graph reads
PATIENCE = 4  # steps of a cache that run without a graph: making one takes as long as several
MOST_ROWS = 16
_CAPTURABLE = ("off", "sdpa", "split", "v1")
"""Attention backends that take positions or a mask from the device and ask it nothing."""

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""Runs a step once or more and returns what runs it again, on the same tensors."""


class StaticStep:
    """One new token for each row of one cache, with shapes that stay the same; and the graphs made of it.

    The cache's tensors must stay where they are. ``tokens`` and ``positions``, int64 [batch], are the input,
    and where it goes.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        # A copy that shares the tensors: graphs are kept while the cache lives, and must not keep it alive.
        self._decoder, self._cache = decoder, copy(cache)
        batch, device = cache.batch, decoder.device
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self._rows = torch.arange(batch, device=device)
        self._first = torch.zeros_like(self._rows)
        self._slots = torch.arange(cache.capacity, device=device)
        # Tables that stay: the decoder replaces those that it has by longer ones.
        cos, sin = decoder.rope.at(self._slots.unsqueeze(0), cache.alphas, cache.capacity)
        self._cos, self._sin = (table.expand(batch, -1, -1, -1) for table in (cos, sin))
        self._scales = self._logn()
        self._fused = gpu.unsupported_reason(decoder.device) is None
        self._made_for = _fingerprint(cache)
        self._by_bound: dict[int, Step] = {}
        self._at: list[int] = []  # what `positions` holds on the device

    def __call__(self, end: int) -> Tensor:
        """Return the logits after ``tokens``, which are written at ``positions``, all below ``end``."""
        places = self.positions.unsqueeze(1)  # [batch, 1]
        mask = (self._slots[:end] <= places).view(-1, 1, 1, end)
        span = Span(places, None, end, causal=False, mask=mask, rows=self._rows, steps=self._first)
        cos, sin = (table[self._rows, self.positions] for table in (self._cos, self._sin))  # [batch, 1, d]
        scales = None if self._scales is None else self._scales[self.positions]
        decoder, attend, spec = self._decoder, self._decoder.attend, self._decoder.spec
        if self._fused:
            fused = TritonOperations(attend, self._cache, span, (cos[:, 0], sin[:, 0]), scales, spec)
            return decoder.logits(decoder.run(self.tokens, fused))
        rotation = cos.unsqueeze(1), sin.unsqueeze(1)
        factors = None if scales is None else scales.view(-1, 1, 1, 1)
        plain = Operations(attend, self._cache, span, rotation, factors, spec)
        return decoder.logits(decoder.run(self.tokens.unsqueeze(1), plain)[:, 0])

    def fits(self, cache: KVCache) -> bool:
        """Return whether the cache's tensors lie where they lay, and its rows are rotated as they were."""
        return _fingerprint(cache) == self._made_for

    def replay(self, tokens: Tensor, lengths: list[int], make: Capture) -> Tensor:
        """Run a step by the graph of its bound, which is made first where there is none."""
        self.tokens.copy_(tokens)
        bound = bound_for(max(lengths) + 1, len(self._slots))
        if self._at != lengths:
            self.positions.copy_(torch.tensor(lengths))
            self._at = list(lengths)
        if bound not in self._by_bound:
            self._by_bound[bound] = make(lambda: self(bound))
        logits = self._by_bound[bound]()
        self.positions.add_(1)
        self._at = [length + 1 for length in lengths]
        return logits

    def _logn(self) -> Tensor | None:
        """Return Qwen v1's factors of the queries, [capacity]; None where no position has one."""
        context = self._decoder.spec.long_context
        if context is None or not context.logn or len(self._slots) <= context.seq_length:
            return None
        return logn_scales(self._slots, context.seq_length).to(self._decoder.dtype)


class Graphs:
    """Decode steps of one decoder by graphs, kept for as long as the cache that they were made for.

    It is on a CUDA GPU, or anywhere with another ``capture``; ``captured`` counts the graphs made so far.
    """

    def __init__(self, decoder: Decoder, capture: Capture | None = None) -> None:
        self._decoder, self._capture = decoder, capture or capture_on_gpu
        self._of_cache: WeakKeyDictionary[KVCache, StaticStep] = WeakKeyDictionary()
        self._steps: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()
        self._alone = Lock()  # while a graph is captured, nothing else may run
        self.captured = 0

    def wants(self, cache: KVCache) -> bool:
        """Return whether the next step over this cache gets a graph: not the first few, nor many rows."""
        done = self._steps.get(cache, 0)
        self._steps[cache] = done + 1
        return done >= PATIENCE and cache.batch <= MOST_ROWS

    @staticmethod
    def unsupported_reason(decoder: Decoder) -> str | None:
        """Return why steps of this decoder cannot be captured; None: they can."""
        if decoder.device.type != "cuda":
            return f"CUDA graphs need a CUDA GPU, and this is a {decoder.device.type}"
        if decoder.attend.name not in _CAPTURABLE and not getattr(decoder.attend, "capturable", False):
            return f"attention {decoder.attend.name} asks the device for lengths, which a graph cannot"
        if decoder.spec.shape.linear_attention is not None:
            return "steps with recurrent states were not tested in graphs"
        if decoder.spec.shape.experts is not None:
            return "which experts a step reads is known only as it runs"
        scaling = decoder.spec.rope_scaling or {}
        if scaling.get("rope_type", scaling.get("type")) == "dynamic":
            return "dynamic rope scaling has no table of all positions"
        return None

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits after one more token, int64 [batch], in each row of the cache."""
        if max(cache.lengths) >= cache.capacity:
            cache.span([1] * cache.batch)  # raises
        with self._alone:
            return self._decode(tokens, cache)

    def _decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        held = self._of_cache.get(cache)
        if held is None or not held.fits(cache):
            held = self._of_cache[cache] = StaticStep(self._decoder, cache)
        with torch.cuda.device_of(tokens):
            logits = held.replay(tokens, cache.lengths, self._make)
        cache.advance([1] * cache.batch)
        return logits.clone()  # the next replay writes into the same tensor

    def _make(self, step: Step) -> Step:
        self.captured += 1
        return self._capture(step)


def _fingerprint(cache: KVCache) -> tuple[int, ...]:
    tensors = (*cache.keys, *cache.values)
    return (cache.capacity, *cache.alphas, *(tensor.data_ptr() for tensor in tensors))


def bound_for(needed: int, capacity: int) -> int:
    """Return the slots that a graph reads: the least power of two that is enough, from `SHORTEST` up."""
    bound = SHORTEST
    while bound < needed:
        bound *= 2
    return min(bound, capacity)


def capture_on_gpu(step: Step) -> Step:
    """Capture a step after two runs, in which kernels are built and libraries allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay
