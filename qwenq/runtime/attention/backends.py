"""List the attention backends by name: which exist, which can run here, and why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.attention.best import Autotuned
from qwenq.runtime.attention.flash import flash_v1_package, flash_v2
from qwenq.runtime.attention.grouped_decode import grouped
from qwenq.runtime.attention.ours import flash_v1_ours, split
from qwenq.runtime.attention.plain import Attention, Off, Sdpa


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
    """Return the backend of that name; one that cannot run here is refused, never replaced.

    Args:
        name: ``v2`` (FlashAttention-2), ``v1`` (FlashAttention), ``off`` (no fused kernel), ``sdpa``
            (whatever torch picks), ``split`` (``sdpa``, decode steps with the cache split over programs),
            ``grouped`` (``sdpa``, decode steps laid out for a CPU),
            ``best`` (the fastest of these, measured now).
        device, dtype: of queries, keys and values.

    Raises:
        UsageError: there is no such backend.
        UnsupportedError: it cannot run on this device or in this dtype; names the reason and what would help.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"there is no attention {name!r}", where="--attention", hint=f"use {', '.join(BACKENDS)}"
        )
    if name != "best":
        return _BUILDERS[name](device, dtype)
    able = [each.name for each in available(device, dtype) if each.implementation and each.name != "best"]
    return Autotuned([_BUILDERS[each](device, dtype) for each in able], device, dtype)


def of_row(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """Return the backend of a table's row that asks for one, and a notice where that is another one.

    Only the cards' columns ``v2`` and ``v1`` of FP32 on a GPU are: no flash kernel takes float32, and theirs,
    too, were measured with plain attention.
    """
    if dtype != torch.float32 or device.type != "cuda" or name not in ("v2", "v1"):
        return name, None
    return "off", f"attention {name} takes no float32: this row ran off, as FP32 rows of the cards did"


def available(device: torch.device, dtype: torch.dtype) -> list[Availability]:
    """Return every backend with what it would run on this device in this dtype, or why it cannot."""
    found = []
    for name, build in _BUILDERS.items():
        try:
            found.append(Availability(name, build(device, dtype).implementation, None))
        except UnsupportedError as error:
            reason = error.what.removeprefix(f"attention {name}: ")
            found.append(Availability(name, None, f"{reason}; {error.hint}" if error.hint else reason))
    names = ", ".join(each.name for each in found if each.implementation is not None)
    return [*found, Availability("best", f"the fastest of {names}, measured at load", None)]


def _v1(device: torch.device, dtype: torch.dtype) -> Attention:
    """Return the package of version 1 where it is installed, else our kernel."""
    package = flash_v1_package() if device.type == "cuda" else None
    return package or flash_v1_ours(device, dtype)


_BUILDERS: dict[str, Callable[[torch.device, torch.dtype], Attention]] = {
    "v2": flash_v2,
    "v1": _v1,
    "off": lambda *_: Off(),
    "sdpa": lambda *_: Sdpa(),
    "split": split,
    "grouped": grouped,
}
BACKENDS = (*_BUILDERS, "best")
