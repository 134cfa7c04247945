"""List the operations: what runs each of them here, and why nothing faster does.

``qwenq doctor`` prints the list; commands print ``fallback_notice`` where operations run slower than they
could on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwenq.compute import columns, cpu, gpu


@dataclass(frozen=True)
class Operation:
    """An operation, and what runs it."""

    name: str  # in the field's words
    runs: str  # the implementation: ``C (avx2)``, ``Triton`` or ``torch``
    # why nothing faster runs, in words that follow "because"; None: this is the fastest there is
    reason: str | None


def operations(device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """Return every operation with what runs it for activations of a dtype on a device."""
    return [_operation(name, kinds, reason, device, dtype) for name, kinds, reason in _TABLE]


def fallback_notice(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a notice of operations of quantising that run in torch for want of a kernel, or None."""
    slow = [each for each in operations(device, dtype) if each.name in QUANTISING and each.reason]
    if not slow:
        return None
    names = ", ".join(each.name for each in slow)
    return f"{names} run in torch, which takes longer, because {slow[0].reason}"


QUANTISING = ("rounding and coordinate descent", "scale search", "Hessians")

_Reason = Callable[[torch.device, torch.dtype], str | None]


def _weights(device: torch.device, dtype: torch.dtype) -> str | None:
    del dtype  # weights and Hessians are float32 whatever activations are
    return columns.fallback_reason(device)


def _linear(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        return gpu.unsupported_reason(device)
    if dtype is not torch.bfloat16:
        given = str(dtype).removeprefix("torch.")
        return f"integers are multiplied with bfloat16 activations, not with {given}"
    return cpu.unsupported_reason()


_activations = cpu.unsupported_input
_TABLE: tuple[tuple[str, tuple[str, ...], _Reason], ...] = (
    ("rounding and coordinate descent", ("cpu", "cuda"), _weights),
    ("scale search", ("cpu",), _weights),
    ("Hessians", ("cpu",), _activations),
    ("norms, rotary positions, gated activations", ("cpu",), _activations),
    ("attention over prompts", ("cpu",), _activations),
    ("quantised linear", ("cpu", "cuda"), _linear),
    ("decode step", ("cpu",), _linear),
)
"""Name, kinds of device that have a kernel, and why it does not run."""


def _operation(
    name: str, kinds: tuple[str, ...], reason: _Reason, device: torch.device, dtype: torch.dtype
) -> Operation:
    if device.type not in kinds or (reason is _activations and dtype not in cpu.DTYPE_CODES):
        return Operation(name, "torch", None)  # torch is what there is
    if why := reason(device, dtype):
        return Operation(name, "torch", why)
    return Operation(name, f"C ({cpu.variant_name()})" if device.type == "cpu" else "Triton", None)
