"""Load the C library for this CPU, and call its kernels.

The best variant that the CPU has the instructions for is loaded once. ``QWENQ_CPU`` lowers it, for tests and
bug reports: the name of a variant, or ``torch`` for no library. Threads are torch's: the library gets the
entry points of the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from qwenq.compute.build import (
    LIBRARIES,
    SOURCES,
    SUFFIX,
    VARIANTS,
    Variant,
    library_name,
    machine_name,
    sources_hash,
)
from qwenq.errors import UsageError

VARIABLE = "QWENQ_CPU"
FOLDER_VARIABLE = "QWENQ_KERNELS"
"""Another folder of libraries, such as one that is compiled with a sanitizer."""

DTYPE_CODES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1})
"""The dtypes of activations that C kernels take, and their number in C (``csrc/vector.h``)."""
_OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86 (Cooper Lake, Zen 4), Arm (Neoverse V1)
_INSTALL = "run python -m qwenq.compute.build, with gcc, clang or the package ziglang"


@dataclass(frozen=True)
class Library:
    """The library of a variant, loaded."""

    variant: Variant  # what it was compiled for
    handle: ctypes.CDLL


def variants_here() -> list[Variant]:
    """Return the variants that this CPU can run, the best first, whether they are compiled or not."""
    has = _capabilities()
    here = [variant for variant in VARIANTS if variant.machine == machine_name(platform.machine())]
    return [variant for variant in here if all(has.get(name) for name in variant.features)]


def variant_name() -> str:
    """Return the name of the variant that runs, or ``torch``."""
    found = library()
    return found.variant.name if isinstance(found, Library) else "torch"


def unsupported_reason() -> str | None:
    """Return why C kernels do not run here, in words that follow "because"; None: they do."""
    found = library()
    return found if isinstance(found, str) else None


def unsupported_input(
    device: torch.device, dtype: torch.dtype, dtypes: Collection[torch.dtype] = tuple(DTYPE_CODES)
) -> str | None:
    """Return why C kernels do not take tensors, in words that follow "because"; None: they do."""
    if device.type != "cpu":
        return f"the C kernels are for CPUs, not for {device.type}"
    if dtype not in dtypes:
        taken, given = (
            " and ".join(str(each).removeprefix("torch.") for each in some) for some in (dtypes, [dtype])
        )
        return f"the C kernels are for {taken}, not for {given}"
    return unsupported_reason()


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for products of bfloat16; elsewhere torch emulates them."""
    return any(_features().get(name) for name in _BFLOAT16)


def float32_is_faster() -> bool:
    """Return whether the CPU multiplies large matrices faster in float32 than in bfloat16.

    It does where bfloat16 is emulated, and on Intel's CPUs without AMX (or under a hypervisor that hides
    it): their instructions for bfloat16 run at half the speed of their two units for float32.
    """
    has = _features()
    intel = str(has.get("cpu_name", "")).startswith("Intel")
    return not multiplies_bfloat16() or (intel and not has.get("amx_bf16"))


def vectorises_512_bits() -> bool:
    """Return whether torch and oneDNN compute with AVX-512 here."""
    lowered = _lowered_to(os.environ.get(VARIABLE, ""))
    if lowered is not None and "avx512_f" not in lowered.features:
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache  # every linear of a prompt asks
def _lowered_to(wanted: str) -> Variant | None:
    """Return the variant that ``QWENQ_CPU`` lowers to; None: it is not set, or is ``torch``."""
    return next((variant for variant in variants_here()[1:] if variant.name == wanted), None)


def _features() -> dict[str, object]:
    """Return what the CPU can do, by torch's names, or a CPU of the variant that ``QWENQ_CPU`` lowers to."""
    found, lowered = _capabilities(), _lowered_to(os.environ.get(VARIABLE, ""))
    if lowered is None:
        return found
    return {"cpu_name": found.get("cpu_name"), **dict.fromkeys(lowered.features, True)}


def library() -> Library | str:
    """Return the library that runs, or why there is none."""
    return _library(os.environ.get(VARIABLE, ""), os.environ.get(FOLDER_VARIABLE, ""))


def loaded(name: str) -> Library:
    """Return the library that runs, for its function ``name``."""
    found = library()
    if isinstance(found, str):
        raise RuntimeError(f"{name} of the C library cannot run because {found}")
    return found


@cache
def _library(wanted: str, folder: str) -> Library | str:
    usable = variants_here()
    if wanted == "torch":
        return f"{VARIABLE}=torch turns it off"
    if wanted:
        usable = [variant for variant in usable if variant.name == wanted]
        if not usable:
            names = ", ".join([variant.name for variant in variants_here()] + ["torch"])
            raise UsageError(
                f"{wanted!r} is not a variant that this CPU can run", where=VARIABLE, hint=f"use {names}"
            )
    if not usable:
        return f"there is no variant for this CPU ({_shortcoming()})"
    place = Path(folder) if folder else LIBRARIES
    reasons = []
    for variant in usable:
        found = _load(variant, place / library_name(variant.name, SUFFIX))
        if isinstance(found, Library):
            return found
        reasons.append(found)
    return reasons[0]


def _load(variant: Variant, path: Path) -> Library | str:
    if not path.is_file():
        return f"the library {path.name} is not compiled ({_INSTALL})"
    try:
        handle = ctypes.CDLL(str(path))
        handle.qwenq_sources.restype = handle.qwenq_variant.restype = ctypes.c_char_p
        made_from, made_for = handle.qwenq_sources().decode(), handle.qwenq_variant().decode()
    except (OSError, AttributeError) as error:
        return f"the library {path.name} cannot be loaded: {str(error).splitlines()[0]} ({_INSTALL})"
    if made_for != variant.name or (SOURCES.is_dir() and made_from != sources_hash()):
        return f"the library {path.name} was compiled from other sources ({_INSTALL})"
    _share_threads(handle)
    return Library(variant, handle)


def _share_threads(handle: ctypes.CDLL) -> None:
    """Pass in torch's OpenMP runtime; leave the library's own pool where torch has another one."""
    torch_library = Path(torch.__path__[0]) / "lib" / f"libtorch_cpu{SUFFIX}"
    try:
        openmp = ctypes.CDLL(str(torch_library))
        entries = [ctypes.cast(getattr(openmp, name), ctypes.c_void_p) for name in _OPENMP]
    except (OSError, AttributeError):
        return
    handle.qwenq_set_threads.restype = None
    handle.qwenq_set_threads(*entries)


def call(name: str, *arguments: Tensor | int | float) -> None:
    """Run a kernel of ``csrc/kernels.def`` on torch's threads.

    It gets tensors as their addresses, integers, and floats as the bits of a float32. The caller has checked
    shapes, dtypes, devices and strides: the kernel relies on them.
    """
    values = [torch.get_num_threads()]
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(argument.data_ptr())
        elif isinstance(argument, float):
            values.append(struct.unpack("<I", struct.pack("<f", argument))[0])
        else:
            values.append(argument)
    kernel(name)((ctypes.c_int64 * len(values))(*values))


def require(
    name: str, x: Tensor, dtype: torch.dtype, shape: Sequence[int], *, contiguous: bool = True
) -> None:
    """Refuse a tensor on the CPU that is not what a kernel relies on: C reads memory by these numbers."""
    sound = x.dtype is dtype and x.shape == tuple(shape) and x.device.type == "cpu"
    if not sound or (contiguous and not x.is_contiguous()):
        wanted = f"{'contiguous ' if contiguous else ''}{dtype} {list(shape)} on a CPU"
        raise ValueError(f"{name}: {x.dtype} {list(x.shape)} on {x.device}, not {wanted}")


def library_constant(name: str, *arguments: int) -> int:
    """Return a constant of the library, such as the width of a panel."""
    function = getattr(loaded(name).handle, name)
    function.restype, function.argtypes = ctypes.c_long, [ctypes.c_long] * len(arguments)
    return int(function(*arguments))


def kernel(name: str) -> Callable[[ctypes.Array[ctypes.c_int64]], None]:
    """Return a kernel as a function of its arguments' array."""
    return _kernel(loaded(name), name)


@cache
def _kernel(library: Library, name: str) -> Callable[[ctypes.Array[ctypes.c_int64]], None]:
    try:
        address = ctypes.cast(getattr(library.handle, name), ctypes.c_void_p).value or 0
    except AttributeError:
        raise RuntimeError(f"the library has no kernel {name}") from None
    return ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))(address)


@cache
def _capabilities() -> dict[str, object]:
    """Return what the CPU can do, by torch's names."""
    found = dict(torch.cpu.get_capabilities())
    if machine_name(platform.machine()) == "aarch64":
        flags = set()
        if Path("/proc/cpuinfo").is_file():
            flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
        found["dot"] = bool(found.get("dot")) or "asimddp" in flags or platform.system() == "Darwin"
    return found


def _shortcoming() -> str:
    """Return what the CPU lacks for the lowest variant of its machine."""
    here = [variant for variant in VARIANTS if variant.machine == machine_name(platform.machine())]
    if not here:
        return f"{platform.machine()} has none"
    lacking = [name for name in here[-1].features if not _capabilities().get(name)]
    return f"{here[-1].name} needs {', '.join(lacking)}"
