"""List the operations: what runs each of them here, and why nothing faster does.

``qwenq doctor`` prints the list; commands print ``fallback_notice`` where operations run slower than they
could on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwenq.compute import columns, cpu, gpu, products


@dataclass(frozen=True)
class Operation:
    """An operation, and what runs it."""

    name: str  # in the field's words
    runs: str  # the implementation: ``C (avx2)``, ``Triton`` or ``torch``
    # why nothing faster runs, in words that follow "because"; None: this is the fastest there is
    reason: str | None


def operations(device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """Return every operation with what runs it for activations of a dtype on a device."""
    return [_operation(name, reason(dtype, device), dtype, device, kinds) for name, kinds, reason in _TABLE]


def fallback_notice(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a notice of operations of quantising that run in torch for want of a kernel, or None."""
    slow = [each for each in operations(device, dtype) if each.name in QUANTISING and each.reason]
    if not slow:
        return None
    names = ", ".join(each.name for each in slow)
    return f"{names} run in torch, which takes longer, because {slow[0].reason}"


QUANTISING = ("rounding and coordinate descent", "scale search", "Hessians")

_Reason = Callable[[torch.dtype, torch.device], str | None]


def _by_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    del dtype  # weights and Hessians are float32 whatever activations are
    return columns.fallback_reason(device)


def _by_c(dtype: torch.dtype, device: torch.device) -> str | None:
    del dtype
    return None if device.type != "cpu" else cpu.unsupported_reason()


def _hessians(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None  # torch's products are what there is
    return products.unsupported_reason(dtype, device)


def _block(dtype: torch.dtype, device: torch.device) -> str | None:
    return None if dtype not in cpu.DTYPE_CODES else cpu.unsupported_input(device, dtype)


def _linear(dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda":
        return gpu.unsupported_reason(device)
    if device.type == "cpu" and dtype is not torch.bfloat16:
        return (
            f"integers are multiplied with bfloat16 activations, not with {str(dtype).removeprefix('torch.')}"
        )
    return cpu.unsupported_reason()


_TABLE: tuple[tuple[str, tuple[str, ...], _Reason], ...] = (
    ("rounding and coordinate descent", ("cpu", "cuda"), _by_kernel),
    ("scale search", ("cpu",), _by_c),
    ("Hessians", ("cpu",), _hessians),
    ("norms, rotary positions, gated activations", ("cpu",), _block),
    ("attention over prompts", ("cpu",), _block),
    ("quantised linear", ("cpu", "cuda"), _linear),
    ("decode step", ("cpu",), _linear),
)
"""Name, kinds of device that have a kernel, and why it does not run."""
_BY_DTYPE = ("Hessians", "norms, rotary positions, gated activations", "attention over prompts")
"""Operations whose kernels take some dtypes of activations."""


def _operation(
    name: str, reason: str | None, dtype: torch.dtype, device: torch.device, kinds: tuple[str, ...]
) -> Operation:
    if device.type not in kinds or (reason is None and dtype not in cpu.DTYPE_CODES and name in _BY_DTYPE):
        return Operation(name, "torch", None)
    if reason is not None:
        return Operation(name, "torch", reason)
    return Operation(name, f"C ({cpu.variant_name()})" if device.type == "cpu" else "Triton", None)
