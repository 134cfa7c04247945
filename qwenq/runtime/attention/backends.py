"""The attention backends by name: which exist, which can run here, and why not."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.attention.flash import check_flash, flash_v1_package, flash_v2
from qwenq.runtime.attention.plain import Attention, Off, Sdpa

BACKENDS = ("v2", "v1", "off", "sdpa")


class Availability(NamedTuple):
    """Whether a backend can run here: exactly one of both is None.

    Attributes:
        name: of the backend.
        implementation: what would run.
        reason: why it cannot, and what would help.
    """

    name: str
    implementation: str | None
    reason: str | None


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend of that name; one that cannot run here is refused, never replaced.

    Args:
        name: ``v2`` (FlashAttention-2), ``v1`` (FlashAttention), ``off`` (no fused kernel), ``sdpa``
            (whatever torch picks).
        device, dtype: of queries, keys and values.

    Raises:
        UsageError: no such name.
        UnsupportedError: it cannot run on this device or in this dtype; says why and what would help.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"there is no attention {name!r}", where="--attention", hint=f"use {', '.join(BACKENDS)}"
        )
    if name == "off":
        return Off()
    if name == "v2":
        return flash_v2(device, dtype)
    if name == "v1":
        return _flash_v1(device, dtype)
    return Sdpa()


def available(device: torch.device, dtype: torch.dtype) -> list[Availability]:
    """Every backend: what it would run on this device in this dtype, or why it cannot."""
    found = []
    for name in BACKENDS:
        try:
            found.append(Availability(name, attention_backend(name, device, dtype).implementation, None))
        except UnsupportedError as error:
            reason = error.what.removeprefix(f"attention {name}: ")
            found.append(Availability(name, None, f"{reason}; {error.hint}" if error.hint else reason))
    return found


def _flash_v1(device: torch.device, dtype: torch.dtype) -> Attention:
    check_flash("v1", device, dtype)
    package = flash_v1_package()
    if package is None:
        raise UnsupportedError(
            "attention v1: flash-attn 1 is not installed",
            where="--attention v1",
            hint="use --attention v2 or off",
        )
    return package
