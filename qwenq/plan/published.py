"""Check the arithmetic: the two-copies cache model beside the peaks that the model cards published."""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.models import catalogue
from qwenq.models.shapes import ModelShape
from qwenq.plan.memory import GIB, generation_memory

CONTEXT = 8192
"""Tokens generated for the second memory figure of the cards."""

_DTYPES = {"FP32": "float32", "BF16": "bfloat16", "Int8": "float16", "Int4": "float16"}


@dataclass(frozen=True)
class PublishedPeak:
    """One published peak at 8192 generated tokens, and that of the two-copies model; GiB."""

    precision: str
    predicted_gib: float
    published_gib: float
    deviation: float
    hardware: str
    source: str


def published_peaks(name: str) -> list[PublishedPeak]:
    """Return every published 8192-token peak of a catalogue name, with its prediction."""
    entry = catalogue.find(name)
    if entry is None:
        return []
    found = []
    for row in catalogue.published(name):
        if len(row.memory_gib) < 2:  # 72B: only the 2048-token figure exists
            continue
        dtype = _DTYPES[row.precision]
        weights = published_bytes(entry.shape, row.precision)
        memory = generation_memory(entry.shape, weights, dtype=dtype, context=CONTEXT)
        predicted, peak = memory.two_copies_peak / GIB, row.memory_gib[1]
        found.append(
            PublishedPeak(row.precision, predicted, peak, predicted / peak - 1, row.hardware, row.source)
        )
    return found


def published_bytes(shape: ModelShape, precision: str) -> int:
    """Return the bytes of the publisher's own file: groups of 128; Qwen v1 is fused and has zero biases."""
    if precision.startswith("Int"):
        v1 = shape.fused_qkv
        return shape.quantised_bytes(int(precision[3:]), 128, zero_biases=v1, fused_qkv=v1)
    return shape.bytes(_DTYPES[precision])
