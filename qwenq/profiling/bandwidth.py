"""How fast memory can be copied here, and how much of that a decoding step uses.

A step reads every weight and the cache once; the share of a copy's bandwidth tells whether a kernel is good,
on any machine. A copy counts what it reads and what it writes. Reading alone can be faster than that, and a
small model may sit in the processor's cache, so a share above 1 is possible and no error.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from qwenq.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from qwenq.runtime.cache import KVCache
    from qwenq.runtime.engine import Engine

_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_REPETITIONS = 9


def copy_bandwidth(device: torch.device, repetitions: int = _REPETITIONS) -> float:
    """Bytes per second of ``Tensor.copy_`` between two buffers that no cache holds, median."""
    import torch

    size = _BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(repetitions + 1):
        synchronise(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds[1:])  # the first one warms up


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square product, for estimates."""
    import torch

    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best = 1e9
    for _ in range(3):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(cache: KVCache) -> int:
    """Bytes of a cache in the form that it has now: some engines rearrange it for decoding."""
    return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))


def weight_bytes(engine: Engine, *, embedding: bool = False) -> int:
    """Bytes of the linear layers and the head as the engine keeps them; with a separate embedding if wanted.

    Raises:
        UnsupportedError: this engine does not say in what form it keeps its weights.
    """
    from qwenq.runtime.engine import FastEngine

    if not isinstance(engine, FastEngine):
        raise UnsupportedError(f"the engine {engine.name} does not say how many bytes a step reads")
    decoder = engine.decoder
    blocks = sum(b.qkv.nbytes + b.out.nbytes + b.gate_up.nbytes + b.down.nbytes for b in decoder.blocks)
    tied = getattr(decoder.head, "weight", None) is decoder.embedding
    return blocks + decoder.head.nbytes + (decoder.embedding.nbytes if embedding and not tied else 0)
