"""What is read from a GPU, with torch's counters and NVIDIA's library replaced: no GPU is needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from brief_profiles import profile_briefly

from qwenq.errors import UnsupportedError
from qwenq.profiling.measure import measure
from qwenq.profiling.meters import CudaMeter, EnergyCounter, meter_for
from qwenq.profiling.spec import Point

CUDA = torch.device("cuda", 1)
GIB = 2**30


@dataclass
class Allocator:
    """Counters as torch.cuda keeps them, of the device that is asked for."""

    now: int = 0
    peak: int = 0
    reserved_peak: int = 0
    used_by_others: int = 3 * GIB
    calls: list[str] = field(default_factory=list)

    def take(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self.reserved_peak = max(self.reserved_peak, self.now + GIB)

    def give(self, nbytes: int) -> None:
        self.now -= nbytes

    def reset(self) -> None:
        self.peak, self.reserved_peak = self.now, self.now


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    made = Allocator()

    def told(name: str, call: Any) -> Any:
        def counter(device: torch.device) -> Any:
            assert device == CUDA
            made.calls.append(name)
            return call()

        return counter

    counters = {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": made.reset,
        "max_memory_allocated": lambda: made.peak,
        "memory_allocated": lambda: made.now,
        "max_memory_reserved": lambda: made.reserved_peak,
        "mem_get_info": lambda: (80 * GIB - made.now - made.used_by_others, 80 * GIB),
    }
    for name, call in counters.items():
        monkeypatch.setattr(torch.cuda, name, told(name, call))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.calls.append("empty_cache"))
    return made


def test_peaks_of_loading_and_generating_are_apart(allocator: Allocator) -> None:
    meter = meter_for(CUDA)
    assert isinstance(meter, CudaMeter)
    allocator.take(9 * GIB)
    allocator.give(5 * GIB)  # what loading needed beside the weights
    assert (meter.peak(), meter.now()) == (9 * GIB, 4 * GIB)
    meter.reset()
    assert (meter.peak(), meter.now()) == (4 * GIB, 4 * GIB)
    allocator.take(2 * GIB)
    assert meter.peak() == 6 * GIB
    assert meter.how == "peak of torch's CUDA allocator"


def test_totals_of_the_device_are_those_of_everybody(allocator: Allocator) -> None:
    allocator.take(4 * GIB)
    found = meter_for(CUDA).also()
    assert found == {"reserved_bytes": 5 * GIB, "device_used_bytes": 7 * GIB, "device_bytes": 80 * GIB}


def test_a_reset_waits_for_the_device_and_frees_what_is_cached_first(allocator: Allocator) -> None:
    meter_for(CUDA).reset()
    assert allocator.calls == ["synchronize", "empty_cache", "reset_peak_memory_stats"]


class Nvml(SimpleNamespace):
    """A driver whose counter gives these millijoules, one a reading."""

    NVMLError = RuntimeError

    def __init__(self, *readings: int) -> None:
        super().__init__()
        self.left, self.asked = list(readings), ""

    def __getattr__(self, name: str) -> Any:
        calls = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": self.handle,
            "nvmlDeviceGetTotalEnergyConsumption": self.reading,
        }
        if name not in calls:
            raise AttributeError(name)
        return calls[name]

    def handle(self, uuid: str) -> str:
        self.asked = uuid
        return uuid

    def reading(self, handle: str) -> int:
        assert handle == self.asked
        if not self.left:
            raise self.NVMLError("Not Supported")
        return self.left.pop(0)


def installed(monkeypatch: pytest.MonkeyPatch, *readings: int) -> Nvml:
    nvml = Nvml(*readings)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    facts = SimpleNamespace(uuid="0123-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    return nvml


def test_energy_is_what_lies_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = installed(monkeypatch, 5_000_000, 5_000_500, 5_012_750)
    counter = EnergyCounter(CUDA)  # reads once, to see whether it can
    before, after = counter.joules(), counter.joules()
    assert after - before == pytest.approx(12.25)
    assert nvml.asked == "GPU-0123-abcd"  # by its own name: CUDA's numbers are not the driver's


def test_a_gpu_without_a_counter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(UnsupportedError, match="NVML: Not Supported"):
        EnergyCounter(CUDA)


@pytest.mark.parametrize(("readings", "joules"), [((0, 1_000, 33_000), 32.0), ((0, 7_000, 7_000), None)])
def test_energy_per_token_is_over_all_tokens_of_the_protocol(
    points: list[Point], monkeypatch: pytest.MonkeyPatch, readings: tuple[int, ...], joules: float | None
) -> None:
    """Of the tiny model on the CPU, with the counter of a GPU; one that did not move is no zero."""
    installed(monkeypatch, *readings)
    monkeypatch.setattr("qwenq.profiling.measure.EnergyCounter", lambda _: EnergyCounter(CUDA))
    profile_briefly(monkeypatch)
    point = next(point for point in points if not point.encodes)
    (row,) = (row for row in measure(point) if row.metric == "energy.token")
    if joules is None:
        assert (row.status, row.reason) == ("unavailable", "too short: the GPU's counter did not move")
        return
    assert row.value == pytest.approx(joules / (row.n * point.tokens))
    assert row.unit == "joules/token"
    assert "idle power included" in row.settings["energy"]
