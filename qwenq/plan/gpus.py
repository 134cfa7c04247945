"""List the GPUs that a plan can be made for (``gpus.toml``)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qwenq.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """A GPU: memory in GiB, peak memory bandwidth in GB/s (10^9 bytes), and where the figures come from."""

    name: str
    title: str
    memory_gib: float
    bandwidth_gb_s: float
    source: str


def gpu(name: str) -> Gpu:
    """Return the GPU of a short name such as ``h200``.

    Raises:
        UsageError: no such name; suggests the nearest.
    """
    found = _known().get(name.lower())
    if found is None:
        from rapidfuzz import process

        nearest = process.extractOne(name.lower(), list(_known()))
        raise UsageError(
            f"GPU {name!r} is not known",
            where="--gpu",
            hint=f"did you mean {nearest[0]}? Known: {', '.join(_known())}" if nearest else None,
        )
    return found


def gpu_names() -> list[str]:
    """Return all short names."""
    return list(_known())


@cache
def _known() -> dict[str, Gpu]:
    text = files("qwenq.plan").joinpath("gpus.toml").read_text(encoding="utf-8")
    return {name: Gpu(name=name, **fields) for name, fields in tomllib.loads(text).items()}
