"""Decode steps of fixed shape, and what is captured when. Only the capture itself needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from copy import copy

import pytest
import torch
from runtime.small_models import FAMILIES, random_ids, small_model
from runtime.test_long_context import S, v1_engine
from torch import Tensor

from qwenq.errors import UsageError
from qwenq.runtime import cuda_graph
from qwenq.runtime import engine as door
from qwenq.runtime.cache import KVCache
from qwenq.runtime.cuda_graph import PATIENCE, Graphs, StaticStep, bound_for
from qwenq.runtime.engine import FastEngine, load


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def fast(family: str, attention: str = "off") -> FastEngine:
    engine = load(small_model(family)[1], device="cpu", dtype="float32", attention=attention)
    assert isinstance(engine, FastEngine)
    return engine


def prefilled(engine: FastEngine, lengths: list[int], capacity: int = 64) -> KVCache:
    cache = engine.new_cache(len(lengths), capacity)
    engine.prefill([random_ids(length, seed) for seed, length in enumerate(lengths)], cache)
    return cache


def static(engine: FastEngine, cache: KVCache, tokens: Tensor, end: int) -> Tensor:
    step = StaticStep(engine.decoder, cache)
    step.tokens.copy_(tokens)
    step.positions.copy_(torch.tensor(cache.lengths))
    logits = step(end)
    cache.advance([1] * cache.batch)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_fixed_shape_equals_a_plain_step(family: str) -> None:
    engine = fast(family)
    for lengths in ([9], [3, 17, 8]):
        plain, fixed = prefilled(engine, lengths), prefilled(engine, lengths)
        for step in range(3):
            tokens = torch.tensor(random_ids(len(lengths), seed=step))
            wanted = engine.decode(tokens, plain)
            found = static(engine, fixed, tokens, end=32 if step else 64)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[S - 2], [S + 5], [3, S + 30, S - 1]])
def test_qwen_v1_beyond_its_trained_length(lengths: list[int]) -> None:
    _, _, engine = v1_engine()
    assert isinstance(engine, FastEngine)
    plain, fixed = (engine.new_cache(len(lengths), 3 * S) for _ in range(2))
    prompts = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    prompts = [[token % 256 for token in prompt] for prompt in prompts]
    for cache in (plain, fixed):
        engine.prefill(prompts, cache)
    for step in range(4):
        tokens = torch.tensor(random_ids(len(lengths), seed=step)) % 256
        found = static(engine, fixed, tokens, end=3 * S)
        torch.testing.assert_close(found, engine.decode(tokens, plain), atol=1e-3, rtol=1e-4)


class Recorder:
    """Captures like a GPU: runs the step, and replays it into the same output."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        step()
        output = step()

        def replay() -> Tensor:
            self.replays += 1
            return output.copy_(step())

        return replay


def test_replays_follow_a_cache_that_grows_and_is_rewound() -> None:
    engine = fast("qwen2-tied")
    recorder = Recorder()
    graphs = Graphs(engine.decoder, recorder)
    plain, graphed = prefilled(engine, [5, 9], 700), prefilled(engine, [5, 9], 700)

    def both(seed: int) -> None:
        tokens = torch.tensor(random_ids(2, seed))
        wanted = engine.decode(tokens, plain)
        torch.testing.assert_close(graphs.decode(tokens, graphed), wanted, atol=1e-4, rtol=1e-4)
        assert graphed.lengths == plain.lengths

    for seed in range(3):
        both(seed)
    assert (graphs.captured, recorder.replays) == (1, 3)
    for cache in (plain, graphed):
        cache.rewind([2, 7])
    both(3)
    for cache in (plain, graphed):  # over the first bound
        engine.prefill([random_ids(252, 7), random_ids(3, 8)], cache)
    both(4)
    assert graphs.captured == 1
    both(5)
    both(6)
    assert graphs.captured == 2
    for cache in (plain, graphed):
        cache.reserve(900)  # its tensors move
    both(7)
    assert graphs.captured == 3


def test_a_result_is_not_overwritten_by_the_next_step() -> None:
    engine = fast("llama")
    graphs = Graphs(engine.decoder, Recorder())
    cache = prefilled(engine, [4])
    first = graphs.decode(torch.tensor([1]), cache)
    kept = first.clone()
    graphs.decode(torch.tensor([2]), cache)
    assert torch.equal(first, kept)


def test_a_full_row_is_refused_and_nothing_is_kept_of_a_cache_that_is_gone() -> None:
    engine = fast("llama")
    graphs = Graphs(engine.decoder, Recorder())
    cache = prefilled(engine, [4, 6], 6)
    with pytest.raises(UsageError, match="do not fit into a cache of 6"):
        graphs.decode(torch.tensor([1, 2]), cache)
    cache.rewind([4, 4])
    graphs.decode(torch.tensor([1, 2]), cache)
    assert len(graphs._of_cache) == 1
    del cache
    gc.collect()
    assert len(graphs._of_cache) == 0


def test_a_few_steps_come_before_a_graph_and_many_rows_never_get_one() -> None:
    engine = fast("llama")
    graphs = Graphs(engine.decoder, Recorder())
    cache, wide = engine.new_cache(2, 8), engine.new_cache(17, 8)
    assert [graphs.wants(cache) for _ in range(PATIENCE + 2)] == [False] * PATIENCE + [True] * 2
    assert not any(graphs.wants(wide) for _ in range(PATIENCE + 2))


@pytest.mark.parametrize(
    ("needed", "capacity", "bound"),
    [(1, 64, 64), (1, 8192, 256), (256, 8192, 256), (257, 8192, 512), (5000, 8193, 8192), (8193, 8193, 8193)],
)
def test_bounds_are_powers_of_two_up_to_the_capacity(needed: int, capacity: int, bound: int) -> None:
    assert bound_for(needed, capacity) == bound


def test_on_a_cpu_there_are_no_graphs() -> None:
    engine = fast("llama")
    assert Graphs.unsupported_reason(engine.decoder) == "CUDA graphs need a CUDA GPU, and this is a cpu"
    assert "graph" not in engine.implementation


def test_whether_a_step_is_fused_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = fast("llama"), []
    monkeypatch.setattr(cuda_graph.gpu, "unsupported_reason", asked.append)  # None: it can be
    ran: list[object] = []
    monkeypatch.setattr(cuda_graph, "TritonOperations", lambda *arguments: ran.append(arguments))
    cache = prefilled(engine, [5])
    monkeypatch.setattr(engine.decoder, "run", lambda ids, operations: torch.zeros(len(ids), 64))
    step = StaticStep(engine.decoder, cache)
    for _ in range(3):
        step(32)
    assert (len(asked), len(ran)) == (1, 3)


@pytest.mark.parametrize("reason", [None, "triton is not installed; pip install triton"])
def test_unused_gpu_kernels_get_one_note(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door.gpu, "unsupported_reason", lambda device: reason)
    on_gpu = copy(fast("llama").decoder)
    on_gpu.device, on_gpu.notes = torch.device("cuda"), ()
    engine = FastEngine(on_gpu)
    unused = "the faster kernels for norms, rotation and activation of decode steps are not used because"
    assert engine.notes == (() if reason is None else (f"{unused} {reason}",))
    assert "decode steps in CUDA graphs" in engine.implementation
    assert ("between products Triton" in engine.implementation) == (reason is None)
