"""What a process has freed, given back to the system before it adds up.

glibc keeps freed pieces of up to 32 MB for itself. Where every layer frees thousands of matrices of a few MB
in another order, the holes between what is still in use add up: 4 MB a layer in a model of 13 MB layers. A
run over layers is to need the same memory after 80 layers as after 8.

What the next layer will ask for again is better kept: to give all of it back behind every layer, and to be
handed other pages for it, takes a tenth of a small model's forward pass.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

GROWTH = 1.04
"""Of the memory that the first layer left behind: beyond it, what is free goes back."""


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim(3); None on other systems, and beside another libc."""
    if sys.platform != "linux":
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def return_freed_memory() -> None:
    """Give pages that nothing uses back to the system, where the allocator keeps them; milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs; where that is not told apart, all of it."""
    import psutil

    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


class FreedMemory:
    """Of a run over layers: kept for the next one, until it is more than the first left behind."""

    def __init__(self) -> None:
        self._enough: float | None = None

    def layer_done(self) -> None:
        """Give back what is free if this process has grown by more than ``GROWTH`` since the first layer."""
        held = anonymous_bytes()
        if self._enough is None:
            self._enough = held * GROWTH
        elif held > self._enough:
            return_freed_memory()
