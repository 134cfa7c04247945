"""The bandwidth bound: the bytes a token reads, over what the memory can deliver."""

from __future__ import annotations

import pytest

from qwenq.models import catalogue
from qwenq.planner.estimates import Gpu, gpu, speed_bound, weight_bytes_per_step
from qwenq.published import published_of

ONE_TB = Gpu("test", "test", 80, 1000, "test")


def test_an_untied_embedding_is_looked_up_and_not_read() -> None:
    untied, tied = catalogue.entry("qwen-7b").shape, catalogue.entry("qwen3-4b").shape
    assert weight_bytes_per_step(untied, untied.bytes(), "bfloat16") == untied.bytes() - 151936 * 4096 * 2
    assert weight_bytes_per_step(tied, tied.bytes(), "bfloat16") == tied.bytes()


def test_the_bound_by_hand() -> None:
    shape = catalogue.entry("qwen3-4b").shape
    bound = speed_bound(shape, 8_000_000_000, ONE_TB, dtype="bfloat16", context=1000)
    assert bound.empty == pytest.approx(125)
    kv = shape.kv_bytes_per_token()
    assert bound.full == pytest.approx(1e12 / (8e9 + 1000 * kv))
    seconds = sum((8e9 + kv * position) / 1e12 for position in range(1000))
    assert bound.mean == pytest.approx(1000 / seconds)


def test_a_batch_reads_the_weights_once_and_its_caches_all() -> None:
    shape = catalogue.entry("qwen3-4b").shape
    one, many = (
        speed_bound(shape, shape.bytes(), ONE_TB, dtype="bfloat16", context=8192, batch=b) for b in (1, 64)
    )
    assert many.empty == pytest.approx(64 * one.empty)
    assert one.full < many.full < 64 * one.full
    two = speed_bound(shape, shape.bytes(), ONE_TB, dtype="bfloat16", context=8192, gpus=2)
    assert two.full == pytest.approx(2 * one.full)


def test_published_speeds_stay_below_the_bound() -> None:
    """What an A100 was measured at, card for card, never exceeds what it could read."""
    a100 = gpu("a100-80g")
    for model in ("qwen-1.8b-chat", "qwen-7b-chat", "qwen-14b-chat"):
        shape = catalogue.entry(model).shape
        for row in published_of(model):
            bits = int(row.precision[3:]) if row.precision.startswith("Int") else None
            dtype = {"FP32": "float32", "BF16": "bfloat16"}.get(row.precision, "float16")
            weights = shape.bytes(dtype) if bits is None else shape.quantised_bytes(bits, 128)
            bound = speed_bound(shape, weights, a100, dtype=dtype, context=8192)
            assert max(max(pair) for pair in row.speed.values()) < bound.mean
