"""Choose device and dtype for a model, and keep within the memory of this machine and its cgroup."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from qwenq.errors import UsageError

if TYPE_CHECKING:
    import torch


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype in which torch runs a model fastest on ``device``, where reading its weights takes the
    time.

    CPU: bfloat16 only where the CPU has instructions for it; elsewhere torch emulates it, slower than float32
    (the fast engine does not: ``runtime.engine.find_dtype``). CUDA: bfloat16 since Ampere, float16 before it.
    Any other device: float32.
    """
    import torch

    from qwenq.compute import cpu

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if kind == "cpu" and cpu.multiplies_bfloat16() else torch.float32


def product_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype for passing whole texts through a model on ``device``, where products take the time.

    It is that of ``compute_dtype``, but for CPUs that have bfloat16 and multiply float32 faster.
    """
    import torch

    from qwenq.compute import cpu

    if torch.device(device).type == "cpu" and cpu.float32_is_faster():
        return torch.float32
    return compute_dtype(device)


def resolve_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype that "auto" or a name stands for in quantising, and the reason in a sentence."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted), f"computing in {wanted} on {device}: as asked"
    dtype = product_dtype(device)
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype is not compute_dtype(device):
        why = "this CPU multiplies bfloat16 more slowly"
    elif device.type == "cpu":
        why = "native on this CPU" if dtype is torch.bfloat16 else "this CPU only emulates bfloat16"
    else:
        why = "the device's native half precision" if dtype is not torch.float32 else "the safe choice there"
    return dtype, f"computing in {name} on {device}: {why}"


def resolve_device(wanted: str) -> torch.device:
    """Return the device that "auto" (a CUDA GPU if there is one), "cpu", "cuda:1" … stands for."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # nothing was tried on others
        raise UsageError(
            f"{wanted!r} is not a device", where="--device", hint="use cpu, cuda, cuda:1 or auto"
        )
    if device.type == "cuda" and (device.index or 0) >= gpus:
        built, hint = "", "use --device cpu"
        if torch.version.cuda is None:
            built = f"; this torch ({torch.__version__}) is built without CUDA"
            hint += ", or install torch's CUDA build: pytorch.org/get-started/locally has the command"
        found = f"{gpus} CUDA GPU{'' if gpus == 1 else 's'} found"
        raise UsageError(f"{wanted} cannot be used: {found}{built}", where="--device", hint=hint)
    return device


# Measure the memory that this process may still take, by the machine and its control groups.
#
# Control groups, versions 1 and 2: cgroup-v1/memory.rst and cgroup-v2.rst of Linux' admin guide.


_GROUPS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use, of version 2 and of version 1."""


def free_memory() -> int:
    """Return the bytes that this process can still take: available memory, within the cgroup limit."""
    available, granted = int(psutil.virtual_memory().available), cgroup_memory_left()
    return available if granted is None else min(available, granted)


def device_memory(device: torch.device) -> int:
    """Return the bytes of the memory that a device computes in: a GPU's, or ``memory_limit``."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_limit()


def memory_limit() -> int:
    """Return the bytes that a process can have at most: the machine's memory, or its cgroup's limit."""
    total = int(psutil.virtual_memory().total)
    return min([total, *(most for folder in _folders(_GROUPS, _MOUNTED) if (most := _granted(folder)))])


def cgroup_memory_left(groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> int | None:
    """Return the bytes up to the nearest cgroup limit, page cache not counted as used; None: no limit."""
    left = [free for folder in _folders(groups, mounted) if (free := _free(folder)) is not None]
    return min(left, default=None)


def _folders(groups: Path, mounted: Path) -> Iterator[Path]:
    """Yield the process's group and those around it; in a container the path may be the host's."""
    lines: list[str] = []
    with suppress(OSError):
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers not in ("", "memory"):
            continue
        root = mounted / controllers
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def _free(folder: Path) -> int | None:
    for limit, used in _FILES:
        with suppress(OSError, ValueError):  # "max" is no number
            most, taken = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            counts = dict(line.split(" ", 1) for line in lines)
            # Linux drops page cache before it ends a process.
            cached = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
            return max(0, most - taken + cached)
    return None


def _granted(folder: Path) -> int | None:
    for limit, _ in _FILES:
        with suppress(OSError, ValueError):
            return int((folder / limit).read_text(encoding="ascii"))
    return None


# Return freed memory to the system before it adds up.
#
# glibc keeps freed pieces of up to 32 MB for itself. Where every layer frees thousands of matrices of a few
# MB in another order, the holes between what is still in use add up: 4 MB a layer in a model of 13 MB
# layers. A run over layers is to need the same memory after 80 layers as after 8.
#
# What the next layer will ask for again is better kept: to give all of it back behind every layer, and to
# be handed other pages for it, takes a tenth of a small model's forward pass. For the same reason glibc
# must not give back by itself what lies free at the end of its heap: half of the system's time went there.


GROWTH = 1.10
"""Of the memory that the first layer left behind: beyond it, what is free goes back. Later layers leave a
twentieth more than the first: with less room than that, it would go back and forth behind every one."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)'s names of them
_NEVER = 2**31 - 1
_LARGEST_IN_HEAP = 32 << 20  # glibc's own limit; to set the other threshold alone would make it 128 KB


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """Return malloc_trim(3) or mallopt(3); None on other systems, and beside another libc."""
    if sys.platform != "linux":
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found


@cache
def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, of pieces up to 32 MB, until ``return_freed_memory``."""
    if (set_option := _glibc("mallopt")) is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        set_option(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Give pages that nothing uses back to the system, where the allocator keeps them; milliseconds."""
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs, or all of it where that is unknown."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class FreedMemory:
    """Of a run over layers: kept for the next one, until it is more than the first left behind."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._enough: float | None = None

    def layer_done(self) -> None:
        """Give back what is free if this process has grown by more than ``GROWTH`` since the first layer."""
        held = anonymous_bytes()
        if self._enough is None:
            self._enough = held * GROWTH
        elif held > self._enough:
            return_freed_memory()
