"""Peak memory between two moments: the CUDA allocator's, or this process's resident set.

A CPU figure is the peak of the whole process (VmHWM), interpreter, libraries and pages of mapped files
included; what the process held before it loaded the model is told beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwenq.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Meter(Protocol):
    """Peak memory since the last reset.

    Attributes:
        how: what the figure is, for the row's settings.
    """

    how: str

    def reset(self) -> None:
        """Begin anew.

        Raises:
            UnsupportedError: this system does not let a process do that.
        """
        ...

    def peak(self) -> int:
        """Bytes at the peak since the last reset, or since the process began."""
        ...

    def now(self) -> int:
        """Bytes held at this moment."""
        ...

    def also(self) -> dict[str, Any]:
        """Further figures of the moment."""
        ...


def meter_for(device: torch.device) -> Meter:
    """The meter of that device.

    Raises:
        UnsupportedError: nothing here tells how much memory a process holds.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    if not _STATUS.exists():
        raise UnsupportedError("peak memory on the CPU is read from /proc, which this system does not have")
    return ResidentMeter()


class ResidentMeter:
    """Of this process, by Linux."""

    how = "peak resident set of the process"

    def reset(self) -> None:
        """Writing 5 sets the peak to what is held now, see proc_pid_clear_refs(5)."""
        try:
            _RESET.write_text("5")
        except OSError as error:
            raise UnsupportedError(f"the peak cannot be reset here: {error}") from error

    def peak(self) -> int:
        """VmHWM."""
        return _status("VmHWM")

    def now(self) -> int:
        """VmRSS."""
        return _status("VmRSS")

    def also(self) -> dict[str, Any]:
        """Pages of mapped files, which the system can take back at any time."""
        return {"mapped_files_bytes": _status("RssFile")}


class CudaMeter:
    """Of torch's allocator, in one process; beside it what the device has given to everyone."""

    how = "peak of torch's CUDA allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Free what is cached, and begin anew."""
        import torch

        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """``torch.cuda.max_memory_allocated``, what the cards printed."""
        import torch

        return torch.cuda.max_memory_allocated(self._device)

    def now(self) -> int:
        """``torch.cuda.memory_allocated``."""
        import torch

        return torch.cuda.memory_allocated(self._device)

    def also(self) -> dict[str, Any]:
        """What the allocator reserved at its peak, and the whole device: used now by all, and its size."""
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        return {"reserved_bytes": reserved, "device_used_bytes": total - free, "device_bytes": total}


def _status(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise UnsupportedError(f"/proc/self/status has no {key} here")
