"""What a process has freed, given back to the system.

glibc keeps freed pieces of up to 32 MB for itself. Where every layer frees thousands of matrices of a few MB
in another order, the holes between what is still in use add up: 4 MB a layer in a model of 13 MB layers. A
run over layers is to need the same memory after 80 layers as after 8.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


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
