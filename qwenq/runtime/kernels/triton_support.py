"""Whether Triton kernels can run here, and the little that both a GPU and the interpreter need of a launch.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, kernels run on CPU tensors, block by
block in numpy: slow, and exact enough to test them against float64.

A launch goes to torch's current GPU, wherever its tensors lie: hence ``torch.cuda.device_of`` around each.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

import torch

_INSTALL = "pip install triton (it comes with a CUDA build of torch on Linux)"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device; None where they can. Does not import triton."""
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        return f"triton is not installed; {_INSTALL}"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA GPU, and this is a {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"they are built for compute capability 8.0 and later, this GPU has {major}.{minor}"
    return None


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
