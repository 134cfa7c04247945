"""Decode steps on a CPU, over a cache whose layout may be entered and left between any two steps."""

from __future__ import annotations

import pytest
import torch
from runtime.small_models import random_ids, reference_logits, small_model

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.engine import load


def test_steps_and_prompts_alternate_over_one_cache() -> None:
    model, checkpoint = small_model("qwen3")
    engine = load(checkpoint, device="cpu", dtype="float32")
    assert "attention grouped" in engine.implementation
    ids = random_ids(60)
    expected = reference_logits(model, ids)
    cache, done = engine.new_cache(1, 30), 0
    for count in (20, 1, 1, 7, 1):
        if count == 1:
            found = engine.decode(torch.tensor([ids[done]]), cache)
        else:
            found = engine.prefill([ids[done : done + count]], cache)
        done += count
        torch.testing.assert_close(found[0], expected[done - 1], atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="31 tokens do not fit into a cache of 30"):
        engine.decode(torch.tensor([1]), cache)
    cache.reserve(60)
    cache.rewind(25)
    for place in range(25, 60):
        found = engine.decode(torch.tensor([ids[place]]), cache)
    torch.testing.assert_close(found[0], expected[-1], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_rows_are_replaced_between_steps() -> None:
    model, checkpoint = small_model("qwen2-tied")
    engine = load(checkpoint, device="cpu", dtype="float32")
    rows = [random_ids(length, length) for length in (4, 19, 11)]
    cache = engine.new_cache(3, 40)
    engine.prefill(rows, cache)
    engine.decode(torch.tensor([1, 2, 3]), cache)  # the cache is laid out for steps from here on
    fresh, other = random_ids(23, 9), engine.new_cache(1, 23)
    engine.prefill([fresh], other)
    cache.put([1], other)
    found = engine.decode(torch.tensor([5, 6, 7]), cache)
    now = [[*rows[0], 1, 5], [*fresh, 6], [*rows[2], 3, 7]]
    expected = torch.stack([reference_logits(model, ids)[-1] for ids in now])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    part = cache.take([2])  # and may be taken out of that layout
    (logits,) = engine.logits([[8, 9]], part)
    torch.testing.assert_close(logits, reference_logits(model, [*now[2], 8, 9])[-2:], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_rows_are_dropped_between_steps() -> None:
    model, checkpoint = small_model("qwen2-tied")
    engine = load(checkpoint, device="cpu", dtype="float32")
    rows = [random_ids(length, length) for length in (4, 19, 11, 7)]
    cache = engine.new_cache(4, 40)
    engine.prefill(rows, cache)
    engine.decode(torch.tensor([1, 2, 3, 4]), cache)
    assert cache.keep([1, 3]) == [3, 1]
    for tokens in ([5, 6], [7, 8]):
        found = engine.decode(torch.tensor(tokens), cache)
    now = [[*rows[3], 4, 5, 7], [*rows[1], 2, 6, 8]]
    expected = torch.stack([reference_logits(model, ids)[-1] for ids in now])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert cache.keep([0]) == [0]
    (logits,) = engine.logits([[8, 9]], cache)  # a prompt leaves that layout
    torch.testing.assert_close(logits, reference_logits(model, [*now[0], 8, 9])[-2:], atol=1e-4, rtol=0)


def test_grouped_is_for_the_cpu() -> None:
    with pytest.raises(UnsupportedError, match="laid out for a CPU"):
        attention_backend("grouped", torch.device("cuda"), torch.bfloat16)


def test_best_takes_grouped_steps_on_a_cpu() -> None:
    """What a step around ``grouped`` saves lies outside attention: measured alone, that would not show it."""
    model, checkpoint = small_model("qwen3")
    engine = load(checkpoint, device="cpu", dtype="float32", attention="best")
    assert ", decode grouped (" in engine.implementation
    assert "decode steps compiled for this CPU" in engine.implementation
    ids = random_ids(12)
    cache = engine.new_cache(1, 16)
    engine.prefill([ids[:10]], cache)
    engine.decode(torch.tensor(ids[10:11]), cache)
    found = engine.decode(torch.tensor(ids[11:12]), cache)
    torch.testing.assert_close(found[0], reference_logits(model, ids)[-1], atol=1e-4, rtol=0)
