"""The table of kernels, the fastest of each device first, and the choice that is made once at load."""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.kernels.base import Need, QuantisedKernel
from qwenq.runtime.kernels.cpu_int4 import CpuInt4, CpuInt8
from qwenq.runtime.kernels.cpu_native import CpuNative
from qwenq.runtime.kernels.dequantise import Dequantise
from qwenq.runtime.kernels.triton_gptq import TritonInt4, TritonInt8

KERNELS: tuple[type[QuantisedKernel], ...] = (
    CpuNative,
    CpuInt4,
    CpuInt8,
    TritonInt4,
    TritonInt8,
    Dequantise,
)
"""Each says itself what it can run; ``auto`` takes the first that does. Import without a GPU has to work."""


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a model.

    Attributes:
        kernel: its class.
        passed_over: one line for each faster kernel of this device that cannot, with its reason.
    """

    kernel: type[QuantisedKernel]
    passed_over: tuple[str, ...]


def choose(name: str, need: Need) -> Choice:
    """The kernel of that name, or the first of the table that can run the model.

    Args:
        name: ``auto`` or a kernel's name.
        need: the model, device and dtype.

    Raises:
        UsageError: there is no such kernel.
        UnsupportedError: the kernel that was asked for cannot run this; no other is taken in its place.
    """
    if name == "auto":
        return _first(need)
    found = [kernel for kernel in KERNELS if kernel.name == name]
    if not found:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise UsageError(f"there is no kernel {name!r}", where="--kernel", hint=f"use auto, {names}")
    if reason := found[0].why_not(need):
        raise UnsupportedError(
            f"the kernel {name} cannot run this model here: {reason}", where="--kernel", hint="use auto"
        )
    return Choice(found[0], ())


def _first(need: Need) -> Choice:
    passed_over: list[str] = []
    for kernel in KERNELS:
        reason = kernel.why_not(need)
        if reason is None:
            return Choice(kernel, tuple(passed_over))
        # Of two kernels for different widths, one is never the faster choice.
        if kernel.device_type == need.device.type and need.bits in getattr(kernel, "widths", (need.bits,)):
            passed_over.append(f"the faster kernel {kernel.name} was passed over: {reason}")
    raise AssertionError("the reference kernel runs everything")
