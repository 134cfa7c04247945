"""Refuse what memory cannot hold, and explain where torch could not allocate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwenq.errors import OutOfMemoryError
from qwenq.models.machine import free_memory

_GPU_REFUSAL = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]?i?B)")
_CPU_REFUSAL = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated: within a container's limit, with what torch holds unused."""
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def require(needed: int, device: torch.device, what: str, hint: str) -> None:
    """Refuse bytes that cannot fit, before the machine starts to swap or ends the process.

    ``what`` needs them, as the subject of a sentence; ``hint`` says which option lowers it.
    """
    free = free_bytes(device)
    if needed > free:
        raise OutOfMemoryError(
            f"{what} needs {gib(needed)}, and {gib(free)} are free on {device}", where=str(device), hint=hint
        )


@contextmanager
def explained(device: torch.device, what: str, hint: str) -> Iterator[None]:
    """Turn torch's refusals to allocate into an error with what was running and what would lower it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = _GPU_REFUSAL.search(str(error))
        raise _out_of_memory(what, asked and asked[1], device, hint) from error
    except RuntimeError as error:
        found = _CPU_REFUSAL.search(str(error))
        if found is None:
            raise
        raise _out_of_memory(what, gib(int(found[1])), device, hint) from error


def gib(count: int) -> str:
    """Format bytes in GiB or MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _out_of_memory(what: str, asked: str | None, device: torch.device, hint: str) -> OutOfMemoryError:
    free = gib(free_bytes(device))
    return OutOfMemoryError(
        f"{what}: out of memory; {asked + ' more were' if asked else 'more was'} asked for, {free} are free",
        where=str(device),
        hint=hint,
    )
