"""What does not fit is refused with its size and the option that lowers it."""

from __future__ import annotations

import pytest
import torch
from runtime.small_models import random_ids, small_model

from qwenq.errors import OutOfMemoryError
from qwenq.models import machine
from qwenq.runtime import memory
from qwenq.runtime.engine import load
from qwenq.runtime.memory import explained, free_bytes, require

CPU = torch.device("cpu")


def test_a_cache_that_cannot_fit_is_refused_before_it_is_allocated() -> None:
    _, checkpoint = small_model("qwen3")
    engine = load(checkpoint, device="cpu", dtype="float32")
    with pytest.raises(OutOfMemoryError, match=r"a cache of 1000000 rows of 1000000 tokens needs .* GiB"):
        engine.new_cache(10**6, 10**6)
    with pytest.raises(OutOfMemoryError) as refused:
        engine.generate([random_ids(5)], 10**12)
    assert "fewer new tokens" in str(refused.value.hint)


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_weights_that_cannot_fit_are_refused(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = small_model("llama")
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    with pytest.raises(OutOfMemoryError, match=r"weights in float32 needs .* free on cpu"):
        load(checkpoint, device="cpu", dtype="float32", engine=engine)


def test_torchs_allocation_error_is_explained() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"a test: out of memory; .* GiB more were asked for"),
        explained(CPU, "a test", "ask for less"),
    ):
        torch.empty(2**55, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB",
            "2.00 GiB more were asked for",
        ),
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.9 GiB)",
            "20.00 MiB more were asked for",
        ),
        ("out of memory", "more was asked for"),
    ],
)
def test_out_of_memory_on_a_gpu_names_the_bytes_asked_for(said: str, asked: str) -> None:
    with (
        pytest.raises(OutOfMemoryError, match=f"a test: out of memory; {asked}, .* are free"),
        explained(CPU, "a test", "ask for less"),
    ):
        raise torch.OutOfMemoryError(said)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained(CPU, "a test", "ask for less"):
        torch.zeros(3).view(7)
    require(1, CPU, "a byte", "ask for less")


def test_out_of_memory_is_a_memory_error() -> None:
    assert issubclass(OutOfMemoryError, MemoryError)


def test_more_than_the_memory_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_memory_left", lambda: 1000)
    assert free_bytes(torch.device("cpu")) == 1000
    with pytest.raises(OutOfMemoryError, match=r"a thing needs 0.0 MiB, and 0.0 MiB are free on cpu"):
        require(1001, torch.device("cpu"), "a thing", "ask for less")
