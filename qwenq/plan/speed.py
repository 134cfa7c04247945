"""Bound the speed of generation by bandwidth: a token cannot come faster than its bytes can be read.

Each step reads every weight once (of an untied embedding only a row a sequence) and the keys and values of
every earlier token of every sequence. Launch overhead, attention arithmetic and sampling come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.models.shapes import ITEMSIZE, ModelShape
from qwenq.plan.gpus import Gpu


@dataclass(frozen=True)
class SpeedBound:
    """Upper bounds in tokens per second, over all sequences of the batch.

    Attributes:
        bytes_per_step: weight bytes read at each step.
        empty: with nothing in the cache.
        full: with ``context`` tokens of each sequence in the cache.
        mean: generating from the first token to the last of ``context``.
    """

    gpu: str
    gpus: int
    bytes_per_step: int
    empty: float
    full: float
    mean: float


def weight_bytes_per_step(shape: ModelShape, weights: int, dtype: str) -> int:
    """Return the weight bytes that one decoding step reads: all but the rows of an untied embedding."""
    return weights if shape.tied else weights - shape.embedding_parameters * ITEMSIZE[dtype]


def speed_bound(
    shape: ModelShape, weights: int, gpu: Gpu, *, dtype: str, context: int, batch: int = 1, gpus: int = 1
) -> SpeedBound:
    """Return the bound for ``gpus`` GPUs that share weights and cache evenly, with communication for free."""
    read = weight_bytes_per_step(shape, weights, dtype)
    bandwidth = gpu.bandwidth_gb_s * 1e9 * gpus
    kv = shape.kv_bytes_per_token(dtype) * batch
    return SpeedBound(
        gpu=gpu.name,
        gpus=gpus,
        bytes_per_step=read,
        empty=batch * bandwidth / read,
        full=batch * bandwidth / (read + kv * context),
        # total time is the sum over n = 0 … context - 1 of (read + kv * n) / bandwidth
        mean=batch * bandwidth / (read + kv * (context - 1) / 2),
    )
