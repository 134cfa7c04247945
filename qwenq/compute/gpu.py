"""Find out whether Triton's kernels run here, and what a launch needs to know of the GPU.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, kernels run on CPU tensors, block by
block in numpy: slow, and exact enough to test them against float64.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_INSTALL = "pip install triton (it comes with a CUDA build of torch on Linux)"


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on this device, in words that follow "because"; None: they can.

    Does not import triton.
    """
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
        return f"Triton kernels are built for compute capability 8.0 and later, this GPU has {major}.{minor}"
    return _no_compiler()


def _no_compiler() -> str | None:
    """Return why Triton cannot compile its launchers, C code with Python.h (triton/runtime/build.py)."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton calls a C compiler, and there is none; apt-get install gcc, or set CC"
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    elsewhere = os.environ.get("CPATH") or os.environ.get("C_INCLUDE_PATH")
    if not elsewhere and not Path(folder, "Python.h").is_file():
        return f"Triton compiles with Python.h, which is not in {folder}; apt-get install python3-dev"
    return None


# Launch Triton kernels alike on a GPU and in the interpreter; import no triton.
#
# A launch goes to torch's current GPU, wherever its tensors lie: hence ``torch.cuda.device_of`` around
# each.


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


def multiprocessors(device: torch.device) -> int:
    """Return how many a GPU has; an H100's for the interpreter, so that it takes the paths of a GPU."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
