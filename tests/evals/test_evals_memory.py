"""The number of rows is one whose cache fits, in whatever layouts it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model

from qwenq.evals.batching import budget_for, new_decode_cache
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import Engine, load

ROWS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("memory") / "tiny")


def storages(cache: KVCache) -> dict[int, int]:
    """Bytes by address of everything that a cache holds."""
    found = (tensor.untyped_storage() for tensor in (*cache.keys, *cache.values))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def most_bytes(engine: Engine, capacity: int) -> int:
    """Of a cache that rows are put into and decoded in: all that it ever held."""
    cache = new_decode_cache(engine, ROWS, capacity)
    found, held = storages(cache), [*cache.keys, *cache.values]  # held: no address is used again
    fresh = engine.new_cache(ROWS, 3)
    engine.prefill([[5, 6, 7]] * ROWS, fresh)
    cache.put(range(ROWS), fresh)
    for _ in range(2):
        engine.decode(torch.full((ROWS,), 8), cache)
        found, held = found | storages(cache), [*held, *cache.keys, *cache.values]
    return sum(found.values())


@pytest.mark.parametrize("name", ["fast", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("capacity", [64, 257, 1000])
def test_as_many_rows_as_fit_into_the_memory(name: str, dtype: str, capacity: int, tiny: Path) -> None:
    engine = load(tiny, device="cpu", dtype=dtype, engine=name)
    memory = most_bytes(engine, capacity)
    budget = replace(budget_for(engine, batch=1000, decode=True), computed=0, logits=0)
    assert replace(budget, memory=memory - 1).rows_to_decode(capacity) < ROWS
    assert replace(budget, memory=int(memory * 1.3)).rows_to_decode(capacity) >= ROWS  # nor far too few


def test_prompts_of_one_token_are_decode_steps(tiny: Path) -> None:
    budget = replace(budget_for(load(tiny, device="cpu", dtype="bfloat16"), batch=1000), computed=0, logits=0)
    memory = 1000 * 100 * budget.cached  # a hundred rows of a thousand slots, in one layout
    assert replace(budget, memory=memory).rows_that_fit(1, 1000) < 50
    assert replace(budget, memory=memory).rows_that_fit(2, 1000) > 50


def test_what_a_container_grants_bounds_the_batch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(tiny, device="cpu", dtype="float32")
    monkeypatch.setattr("qwenq.models.machine.cgroup_memory_left", lambda: 10_000_000)
    assert budget_for(engine).memory <= 5_000_000
