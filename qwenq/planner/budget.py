"""Read the size that a quantised model shall have: bits of a weight, bytes of a model, or what fits a GPU."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import ceil

from qwenq.errors import UsageError
from qwenq.models.shapes import ModelShape
from qwenq.planner.estimates import GIB, generation_memory, gpu
from qwenq.planner.plan import QUANTISED_DTYPE

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")
_GPU = re.compile(r"([A-Za-z0-9.-]+):([1-9]\d{0,9})")
_BITS = re.compile(r"\d+(?:\.\d+)?")
_OPTION = "--budget"


@dataclass(frozen=True)
class Sizes:
    """What a model's size is made of, in bytes."""

    elements: int  # weights whose bits are open
    least: int  # their tensors with all of them in 4 bits
    most: int  # the same with 8 bits
    fixed: int  # all other tensors

    def described(self, nbytes: int) -> str:
        """Return a size of the open weights in all units: ``4.19 bits, 459.3 MB``."""
        return f"{8 * nbytes / self.elements:.2f} bits, {(self.fixed + nbytes) / 1e6:,.1f} MB"


def allowed_bytes(budget: str | float, sizes: Sizes, shape: ModelShape | None) -> int:
    """Return the bytes that the weights whose bits are open may take.

    Args:
        budget: ``4.5``: bits that a weight takes, scales and zero points included; ``450MB``: all tensors;
            ``rtx-4090:8192``: what that GPU's memory leaves beside the cache of so many tokens, as in a plan.
        sizes, shape: of the model; a shape may be unknown.
    """
    text = str(budget)
    if (found := _BYTES.fullmatch(text)) is not None:
        nbytes = int(float(found[1]) * UNITS[found[2]]) - sizes.fixed
    elif (named := _GPU.fullmatch(text)) is not None:
        nbytes = _beside_the_cache(named[1], int(named[2]), shape) - sizes.fixed
    elif _BITS.fullmatch(text) is not None:
        nbytes = int(float(text) * sizes.elements / 8)
    else:
        raise UsageError(
            f"{text!r} is not a size",
            where=_OPTION,
            hint="give bits of a weight (4.5), bytes (450MB), or a GPU and tokens (rtx-4090:8192)",
        )
    if nbytes < sizes.least:
        bits, megabytes = 8 * sizes.least / sizes.elements, (sizes.fixed + sizes.least) / 1e6
        raise UsageError(
            f"{text} is too small: with all of its linear layers in 4 bits the model takes "
            f"{sizes.described(sizes.least)}",
            where=_OPTION,
            hint=f"the smallest that works is {ceil(100 * bits) / 100} bits, or {ceil(megabytes)}MB",
        )
    if nbytes >= sizes.most and ":" not in text:
        raise UsageError(
            f"{text} is more than 8 bits for every weight take: {sizes.described(sizes.most)}",
            where=_OPTION,
            hint="--bits 8 is all that you need",
        )
    return min(nbytes, sizes.most)


def _beside_the_cache(name: str, tokens: int, shape: ModelShape | None) -> int:
    there = gpu(name)
    if shape is None:
        raise UsageError(
            "what a model of this type needs beside its weights is not known",
            where=_OPTION,
            hint="give bits, such as 4.5, or bytes, such as 5GB",
        )
    rest = generation_memory(shape, 0, dtype=QUANTISED_DTYPE, context=tokens).peak
    return int(there.memory_gib * GIB) - rest
