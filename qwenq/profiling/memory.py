"""Measure peak memory between two moments: of the CUDA allocator, or the resident set of this process.

A CPU figure is the peak of the whole process (VmHWM), with interpreter, libraries and pages of mapped files;
what the process held before it loaded the model is in the row beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwenq.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter(Protocol):
    """Peak memory since the last reset; ``how`` describes the figure in the rows' settings."""

    how: str

    def reset(self) -> None:
        """Set the peak to what is held now.

        Raises:
            UnsupportedError: this system does not let a process do that.
        """
        ...

    def peak(self) -> int:
        """Return the bytes at the peak since the last reset, or since the process began."""
        ...

    def now(self) -> int:
        """Return the bytes that are held at this moment."""
        ...

    def also(self) -> dict[str, Any]:
        """Return further figures of this moment, for a row's details."""
        ...


def meter_for(device: torch.device) -> Meter:
    """Return the meter of that device.

    Raises:
        UnsupportedError: the system has no /proc.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    if not _STATUS.exists():
        raise UnsupportedError("peak memory on the CPU is read from /proc, which this system does not have")
    return ResidentMeter()


class ResidentMeter:
    """The resident set of this process, from Linux."""

    how = "peak resident set of the process"

    def reset(self) -> None:
        """Set VmHWM to VmRSS by writing 5, see proc_pid_clear_refs(5)."""
        try:
            _RESET.write_text("5")
        except OSError as error:
            raise UnsupportedError(f"the peak cannot be reset here: {error}") from error

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
        import torch

        self._device, self._cuda = device, torch.cuda

    def reset(self) -> None:
        """Free what the allocator caches, and set its peak to what is held."""
        self._cuda.synchronize(self._device)
        self._cuda.empty_cache()
        self._cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return ``torch.cuda.max_memory_allocated``, which the cards printed."""
        return self._cuda.max_memory_allocated(self._device)

    def now(self) -> int:
        """Return ``torch.cuda.memory_allocated``."""
        return self._cuda.memory_allocated(self._device)

    def also(self) -> dict[str, Any]:
        """Return what the allocator reserved at its peak, and the device's size and use by all processes."""
        free, total = self._cuda.mem_get_info(self._device)
        reserved = self._cuda.max_memory_reserved(self._device)
        return {"reserved_bytes": reserved, "device_used_bytes": total - free, "device_bytes": total}


def _status(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise UnsupportedError(f"/proc/self/status has no {key} here")
