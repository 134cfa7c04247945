"""Read the meters of a device: peak memory, energy, and how fast it copies and multiplies."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenq.errors import UnsupportedError
from qwenq.runtime.generation import timed

if TYPE_CHECKING:
    from qwenq.runtime.cache import KVCache
    from qwenq.runtime.decoder import Decoder
    from qwenq.runtime.engine import Engine

# Measure peak memory between two moments: of the CUDA allocator, or the resident set of this process.
#
# A CPU figure is the peak of the whole process (VmHWM), with interpreter, libraries and pages of mapped
# files; what the process held before it loaded the model is in the row beside it.


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ResidentMeter:
    """The resident set of this process, from Linux."""

    how = "peak resident set of the process"

    def reset(self) -> str | None:
        """Set VmHWM to VmRSS by writing 5, see proc_pid_clear_refs(5); return why that is not possible."""
        try:
            _RESET.write_text("5")
        except OSError as error:
            return f"the peak cannot be reset here: {error}"
        return None

    def peak(self) -> int:
        """Return VmHWM."""
        return _status("VmHWM")

    def now(self) -> int:
        """Return VmRSS."""
        return _status("VmRSS")

    def also(self) -> dict[str, Any]:
        """Return the pages of mapped files, which the system can take back at any time."""
        return {"mapped_files_bytes": _status("RssFile")}


class CudaMeter:
    """The memory of torch's allocator in this process; beside it that of the whole device."""

    how = "peak of torch's CUDA allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> str | None:
        """Free what the allocator caches, and set its peak to what is held, which is always possible."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return None

    def peak(self) -> int:
        """Return ``torch.cuda.max_memory_allocated``, which the cards printed."""
        return torch.cuda.max_memory_allocated(self._device)

    def now(self) -> int:
        """Return ``torch.cuda.memory_allocated``."""
        return torch.cuda.memory_allocated(self._device)

    def also(self) -> dict[str, Any]:
        """Return what the allocator reserved at its peak, and the device's size and use by all processes."""
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        return {"reserved_bytes": reserved, "device_used_bytes": total - free, "device_bytes": total}


Meter = ResidentMeter | CudaMeter
"""Peak memory since the last reset, or since the process began; rows have ``how`` in their settings."""


def meter_for(device: torch.device) -> Meter:
    """Return the meter of that device; refuse a CPU on a system without /proc."""
    if device.type == "cuda":
        return CudaMeter(device)
    if not _STATUS.exists():
        raise UnsupportedError("peak memory on the CPU is read from /proc, which this system does not have")
    return ResidentMeter()


def _status(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise UnsupportedError(f"/proc/self/status has no {key} here")


ENERGY_SOURCE = "the GPU's counter over the protocol's generations: the whole GPU, idle power included"


class EnergyCounter:
    """The counter of one GPU; ``UnsupportedError`` names the reason where there is none that can be read."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedError("energy is measured on NVIDIA GPUs only")
        try:
            import pynvml
        except ImportError as error:
            raise UnsupportedError("the package nvidia-ml-py is not installed") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except pynvml.NVMLError as error:
            raise UnsupportedError(f"NVML: {error}") from error

    def joules(self) -> float:
        """Return the energy used since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


# Measure how fast memory is copied here, and count the bytes that a decoding step reads.
#
# A step reads every weight and the cache once; its share of a copy's bandwidth tells on any machine whether
# a kernel is good. A copy counts what it reads and what it writes. Reading alone can be faster, and a small
# model may fit the processor's cache, so a share above 1 is possible and no error.


_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def copy_bandwidth(device: torch.device, repetitions: int = 9) -> float:
    """Return the bytes per second of ``Tensor.copy_`` between two buffers that fit no cache, median."""
    size = _BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), device, repetitions))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a square product, for estimates."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device, 2))


def cache_bytes(cache: KVCache) -> int:
    """Return the bytes of a cache in its present form: some engines rearrange it for decoding."""
    return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) + state_bytes(cache)


def state_bytes(cache: KVCache) -> int:
    """Return the bytes of a cache's recurrent states, which every step reads and writes whole."""
    return sum(tensor.nbytes for pair in cache.states for tensor in pair)


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of the linear layers, the head and the embedding as the engine keeps them."""
    decoder = _decoder(engine)
    blocks = sum(linear.nbytes for block in decoder.blocks for linear in block.linears)
    tied = getattr(decoder.head, "weight", None) is decoder.embedding
    return blocks + decoder.head.nbytes + (0 if tied else decoder.embedding.nbytes)


def step_bytes(engine: Engine) -> int:
    """Return the bytes of weights that a decode step of one row reads: of a mixture, its active experts'."""
    decoder = _decoder(engine)
    return sum(block.step_bytes for block in decoder.blocks) + decoder.head.nbytes


def _decoder(engine: Engine) -> Decoder:
    from qwenq.runtime.engine import FastEngine

    if not isinstance(engine, FastEngine):
        raise UnsupportedError(f"the bytes that a step reads are not known with the engine {engine.name}")
    return engine.decoder
