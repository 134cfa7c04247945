"""List the quantised linears, the fastest of each device first, and choose one at load."""

from __future__ import annotations

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.kernels.base import QuantLinear, Requirements
from qwenq.runtime.kernels.cpu_native import CpuNative
from qwenq.runtime.kernels.dequantise import Dequantise
from qwenq.runtime.kernels.triton_gptq import TritonInt4, TritonInt8

KERNELS: tuple[type[QuantLinear], ...] = (CpuNative, TritonInt4, TritonInt8, Dequantise)
"""``auto`` takes the first that is supported. Importing them works without a GPU."""


def choose(name: str, need: Requirements) -> tuple[type[QuantLinear], list[str]]:
    """Return the kernel of that name, or the first of the table that can run the model.

    Args:
        name: ``auto`` or a kernel's name.
        need: the model, device and dtype.

    Returns:
        The kernel, and a notice for each faster one of this device that is not used, with the reason.

    Raises:
        UsageError: there is no such kernel.
        UnsupportedError: the kernel that was asked for cannot run this; no other is taken in its place.
    """
    if name == "auto":
        return _fastest(need)
    found = next((kernel for kernel in KERNELS if kernel.name == name), None)
    if found is None:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise UsageError(f"there is no kernel {name!r}", where="--kernel", hint=f"use auto, {names}")
    if reason := found.unsupported_reason(need):
        raise UnsupportedError(
            f"the kernel {name} cannot run this model here: {reason}", where="--kernel", hint="use auto"
        )
    return found, []


def _fastest(need: Requirements) -> tuple[type[QuantLinear], list[str]]:
    notices: list[str] = []
    for kernel in KERNELS:
        reason = kernel.unsupported_reason(need)
        if reason is None:
            return kernel, notices
        # Of two kernels for different widths, one is never the faster choice.
        if kernel.device_type == need.device.type and need.bits in kernel.widths:
            notices.append(f"the faster kernel {kernel.name} is not used because {reason}")
    raise AssertionError("the reference kernel runs everything")
