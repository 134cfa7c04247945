"""Find out whether Triton's kernels can be built and run here: Triton, a GPU, and a C compiler."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path

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
