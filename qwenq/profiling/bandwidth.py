"""Measure how fast memory is copied here, and count the bytes that a decoding step reads.

A step reads every weight and the cache once; its share of a copy's bandwidth tells on any machine whether a
kernel is good. A copy counts what it reads and what it writes. Reading alone can be faster, and a small
model may fit the processor's cache, so a share above 1 is possible and no error.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from qwenq.errors import UnsupportedError

if TYPE_CHECKING:
    from qwenq.runtime.cache import KVCache
    from qwenq.runtime.engine import Engine

_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def copy_bandwidth(device: torch.device, repetitions: int = 9) -> float:
    """Return the bytes per second of ``Tensor.copy_`` between two buffers that fit no cache, median."""
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
    """Return the floating-point operations per second of a square product, for estimates."""
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
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(cache: KVCache) -> int:
    """Return the bytes of a cache in its present form: some engines rearrange it for decoding."""
    return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))


def weight_bytes(engine: Engine, *, embedding: bool = False) -> int:
    """Return the bytes of the linear layers and the head as the engine keeps them.

    Args:
        embedding: with an embedding that is not the head.

    Raises:
        UnsupportedError: this engine does not tell in what form it keeps its weights.
    """
    from qwenq.runtime.engine import FastEngine

    if not isinstance(engine, FastEngine):
        raise UnsupportedError(f"the bytes that a step reads are not known with the engine {engine.name}")
    decoder = engine.decoder
    blocks = sum(b.qkv.nbytes + b.out.nbytes + b.gate_up.nbytes + b.down.nbytes for b in decoder.blocks)
    tied = getattr(decoder.head, "weight", None) is decoder.embedding
    return blocks + decoder.head.nbytes + (decoder.embedding.nbytes if embedding and not tied else 0)
