"""Return freed memory to the system before it adds up.

glibc keeps freed pieces of up to 32 MB for itself. Where every layer frees thousands of matrices of a few MB
in another order, the holes between what is still in use add up: 4 MB a layer in a model of 13 MB layers. A
run over layers is to need the same memory after 80 layers as after 8.

What the next layer will ask for again is better kept: to give all of it back behind every layer, and to be
handed other pages for it, takes a tenth of a small model's forward pass. For the same reason glibc must not
give back by itself what lies free at the end of its heap: half of the system's time went there.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

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
    set_option = _glibc("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        set_option(_TRIM_THRESHOLD, _NEVER)


def return_freed_memory() -> None:
    """Give pages that nothing uses back to the system, where the allocator keeps them; milliseconds."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs, or all of it where that is unknown."""
    import psutil

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
