"""Launch Triton kernels alike on a GPU and in the interpreter; import no triton.

A launch goes to torch's current GPU, wherever its tensors lie: hence ``torch.cuda.device_of`` around
each.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from qwenq.compute.gpu import interpreting


def triton_label() -> str:
    """Return ``Triton`` with its version, and whether it is the interpreter that runs."""
    return f"Triton {metadata.version('triton')}{' interpreter' if interpreting() else ''}"


def bound(blocks: int) -> Any:
    """Return the bound of a loop in a kernel.

    A plain number for the compiler, so that a longer context is no new kernel. The interpreter cannot loop
    to a tensor (it calls ``int`` on an array of one element, which numpy 2.4 refuses) but to a constant.
    """
    if not interpreting():
        return blocks
    import triton.language as tl

    return tl.constexpr(blocks)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least ``n``: blocks have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Return how many a GPU has; an H100's for the interpreter, so that it takes the paths of a GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
