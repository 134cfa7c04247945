"""Whether machine code can be made here: llvmlite, the threads of torch, features of the CPU."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
"""What compiled code calls of GNU OpenMP."""

BFLOAT16 = ("avx512f", "avx512bw", "avx512vl", "avx512bf16")
"""What a CPU needs to multiply bfloat16 as ``bfloat16.add_pairs`` does."""


@cache
def why_not(*features: str) -> str | None:
    """Why not, in words that follow "because"; None: it can.

    Args:
        features: of the CPU, as LLVM names them.
    """
    if find_spec("llvmlite") is None:
        return "llvmlite, which compiles it, is not installed (pip install 'qwenq[cpu]')"
    try:
        for symbol in OPENMP:
            getattr(openmp(), symbol)
    except (OSError, AttributeError):
        return "the threads of this torch are not GNU OpenMP's"
    from llvmlite.binding import get_host_cpu_features

    here = get_host_cpu_features()
    lacking = [name for name in features if not here.get(name)]
    return f"this CPU has no {', '.join(lacking)}" if lacking else None


@cache
def openmp() -> ctypes.CDLL:
    """A library of torch, whose dependencies hold the very OpenMP that torch runs on.

    Raises:
        OSError: it is not where the wheels for Linux have it.
    """
    return ctypes.CDLL(str(Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"))
