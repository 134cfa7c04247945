"""Both engines against transformers' own forward pass: float32 logits of every family."""

from __future__ import annotations

import pytest
import torch
from runtime.small_models import FAMILIES, HYBRIDS, random_ids, reference_logits, small_model
from runtime.test_long_context import v1_engine

from qwenq.runtime.engine import Engine, load
from qwenq.runtime.sampling import GREEDY

ENGINES = ("fast", "transformers")
TOLERANCE = 1e-4
RAGGED = (1, 17, 600, 3, 250)


def float32_engine(checkpoint, engine: str) -> Engine:
    return load(checkpoint, device="cpu", dtype="float32", engine=engine)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_one_row(family: str, engine: str) -> None:
    model, checkpoint = small_model(family)
    runner = float32_engine(checkpoint, engine)
    for tokens in (1, 17, 600):
        ids = random_ids(tokens)
        (found,) = runner.logits([ids])
        assert_close(found, reference_logits(model, ids))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_ragged_batch_prefilled_then_decoded(family: str, engine: str) -> None:
    model, checkpoint = small_model(family)
    runner = float32_engine(checkpoint, engine)
    rows = [random_ids(length + 3, seed) for seed, length in enumerate(RAGGED)]
    expected = [reference_logits(model, row) for row in rows]
    cache = runner.new_cache(len(rows), 603)
    last = runner.prefill([row[:-3] for row in rows], cache)
    assert_close(last, torch.stack([logits[-4] for logits in expected]))
    for step in (-3, -2, -1):
        last = runner.decode(torch.tensor([row[step] for row in rows]), cache)
        assert_close(last, torch.stack([logits[step] for logits in expected]))
    assert cache.lengths == [len(row) for row in rows]


@pytest.mark.parametrize("engine", ENGINES)
def test_uniform_batch(engine: str) -> None:
    model, checkpoint = small_model("qwen2-tied")
    runner = float32_engine(checkpoint, engine)
    rows = [random_ids(40, seed) for seed in range(5)]
    cache = runner.new_cache(5, 41)
    for found, row in zip(runner.logits(rows, cache), rows, strict=True):
        assert_close(found, reference_logits(model, row))
    found = runner.decode(torch.tensor([7] * 5), cache)
    assert_close(found, torch.stack([reference_logits(model, [*row, 7])[-1] for row in rows]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_rewound_and_extended(family: str, engine: str) -> None:
    model, checkpoint = small_model(family)
    runner = float32_engine(checkpoint, engine)
    first, second = random_ids(50, 1), random_ids(30, 2)
    cache = runner.new_cache(1, 64)
    runner.prefill([first], cache)
    cache.rewind(20)
    found = torch.cat(runner.logits([second], cache))
    assert_close(found, reference_logits(model, first[:20] + second)[20:])
    cache.rewind(49)
    cache.reserve(100)  # a larger cache holds what the smaller one did
    found = torch.cat(runner.logits([second], cache))
    assert_close(found, reference_logits(model, first[:20] + second[:29] + second)[49:])


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_extended_by_different_counts(engine: str) -> None:
    model, checkpoint = small_model("llama")
    runner = float32_engine(checkpoint, engine)
    starts, ends = [random_ids(n, n) for n in (60, 5, 20)], [random_ids(n, 9 * n) for n in (4, 30, 1)]
    cache = runner.new_cache(3, 64)  # row 0 is filled to the last slot, its padding must not be written
    runner.prefill(starts, cache)
    for found, start, end in zip(runner.logits(ends, cache), starts, ends, strict=True):
        assert_close(found, reference_logits(model, start + end)[len(start) :])


@pytest.mark.parametrize("engine", ENGINES)
def test_forked_prefix(engine: str) -> None:
    model, checkpoint = small_model("qwen2-tied")
    runner = float32_engine(checkpoint, engine)
    prefix, ends = random_ids(33), [random_ids(n, n) for n in (1, 8, 3)]
    shared = runner.new_cache(1, 33)
    runner.prefill([prefix], shared)
    for found, end in zip(runner.logits(ends, shared.take([0] * 3, 41)), ends, strict=True):
        assert_close(found, reference_logits(model, prefix + end)[33:])
    assert shared.lengths == [33]


@pytest.mark.parametrize("engine", ENGINES)
def test_finished_rows_make_room_for_the_next_prompts(engine: str) -> None:
    model, checkpoint = small_model("qwen3")
    runner = float32_engine(checkpoint, engine)
    first, second = [random_ids(n, n) for n in (9, 4, 20)], [random_ids(n, n) for n in (15, 6)]
    cache = runner.new_cache(3, 24)
    runner.prefill(first, cache)
    fresh = runner.new_cache(2, 24)
    found = runner.prefill(second, fresh)
    cache.put([2, 0], fresh)
    assert_close(found, torch.stack([reference_logits(model, row)[-1] for row in second]))
    now = [second[1], first[1], second[0]]
    found = runner.decode(torch.tensor([5, 6, 7]), cache)
    expected = [reference_logits(model, [*row, new])[-1] for row, new in zip(now, (5, 6, 7), strict=True)]
    assert_close(found, torch.stack(expected))
    assert cache.lengths == [7, 5, 16]


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_greedy_tokens_are_those_of_transformers_generate(family: str) -> None:
    model, checkpoint = small_model(family)
    prompt = random_ids(12)
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    for engine in ENGINES:
        runner = float32_engine(checkpoint, engine)
        done = runner.generate([prompt], 20, sampling=GREEDY)
        assert done.answers[0].ids == whole[0, 12:].tolist()


def test_qwen_v1_is_the_same_in_both_engines() -> None:
    """Up to its trained length; beyond, the fast engine alone has its rules (test_long_context)."""
    *_, fast = v1_engine("fast", seq_length=1024)
    *_, other = v1_engine("transformers", seq_length=1024)
    rows = [[token % 256 for token in random_ids(length + 1, seed)] for seed, length in enumerate(RAGGED)]
    caches = [engine.new_cache(len(rows), 1000) for engine in (fast, other)]
    prompts, newest = [row[:-1] for row in rows], torch.tensor([row[-1] for row in rows])
    engines = list(zip((fast, other), caches, strict=True))
    for ours, theirs in zip(*(engine.logits(prompts, cache) for engine, cache in engines), strict=True):
        assert_close(ours, theirs)
    assert_close(*(engine.decode(newest, cache) for engine, cache in engines))
    for cache in caches:
        cache.rewind([1, 9, 300, 2, 250])
    for ours, theirs in zip(*(engine.logits(rows[::-1], cache) for engine, cache in engines), strict=True):
        assert_close(ours, theirs)
    alone = [engine.generate(rows[:2], 20, sampling=GREEDY).answers for engine in (fast, other)]
    assert alone[0] == alone[1]


def test_bfloat16_is_near_float32() -> None:
    _, checkpoint = small_model("qwen3")
    ids = random_ids(64)
    exact = load(checkpoint, device="cpu", dtype="float32").logits([ids])[0]
    rounded = load(checkpoint, device="cpu", dtype="bfloat16").logits([ids])[0]
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05
