"""Whether machine code can be made here: llvmlite, the threads of torch, features of the CPU."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
"""What compiled code calls of GNU OpenMP."""

FEATURES = {
    torch.bfloat16: ("avx512f", "avx512bw", "avx512vl", "avx512bf16"),
    torch.float32: ("avx512f",),
}
"""What a CPU needs to multiply activations of a dtype as ``numbers`` does."""

OLDEST = 0, 46
"""The first llvmlite that ``code`` can be built with: opaque pointers, LLVM's newer passes."""

_INSTALL = "pip install 'qwenq[cpu]'"


@cache
def why_not(*features: str) -> str | None:
    """Why not, in words that follow "because"; None: it can.

    Args:
        features: of the CPU, as LLVM names them.
    """
    if lacking_compiler := _no_compiler():
        return lacking_compiler
    try:
        for symbol in OPENMP:
            getattr(openmp(), symbol)
    except (OSError, AttributeError):
        return "the threads of this torch are not GNU OpenMP's"
    from llvmlite.binding import get_host_cpu_features

    here = get_host_cpu_features()
    lacking = [name for name in features if not here.get(name)]
    return f"this CPU has no {', '.join(lacking)}" if lacking else None


def why_not_multiply(dtype: torch.dtype) -> str | None:
    """Why activations of that dtype are not for compiled products, in such words; None: they are."""
    if dtype not in FEATURES:
        names = " and ".join(str(known).removeprefix("torch.") for known in FEATURES)
        return f"that is for {names}, not for {str(dtype).removeprefix('torch.')}"
    return why_not(*FEATURES[dtype])


def _no_compiler() -> str | None:
    """Why llvmlite cannot compile it; None: it can. It is asked for its version, not loaded."""
    try:
        found = version("llvmlite") if find_spec("llvmlite") else None
    except PackageNotFoundError:
        found = None
    if found is None:
        return f"llvmlite, which compiles it, is not installed ({_INSTALL})"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"llvmlite, which compiles it, is {found} and has to be {wanted} or newer ({_INSTALL})"
    return None


@cache
def openmp() -> ctypes.CDLL:
    """A library of torch, whose dependencies hold the very OpenMP that torch runs on.

    Raises:
        OSError: it is not where the wheels for Linux have it.
    """
    return ctypes.CDLL(str(Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"))
