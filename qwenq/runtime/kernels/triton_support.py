"""The little that both a GPU and Triton's interpreter need of a launch; ``native.gpu`` says whether they can.

A launch goes to torch's current GPU, wherever its tensors lie: hence ``torch.cuda.device_of`` around each.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from qwenq.compute.gpu import interpreting


def triton_label() -> str:
    """``Triton 3.6.0``, and whether it is the interpreter that runs."""
    return f"Triton {metadata.version('triton')}{' interpreter' if interpreting() else ''}"


def bound(blocks: int) -> Any:
    """The bound of a loop in a kernel.

    A plain number for the compiler, so that a longer context is no new kernel. The interpreter cannot loop
    to a tensor (it calls ``int`` on an array of one element, which numpy 2.4 refuses) but to a constant.
    """
    if not interpreting():
        return blocks
    import triton.language as tl

    return tl.constexpr(blocks)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``: blocks have such sizes."""
    return 1 << max(n - 1, 0).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; an H100's number for the interpreter, so that it takes the paths that a GPU takes."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
