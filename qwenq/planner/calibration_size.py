"""Choose how much calibration text fits the memory: for ``quantize`` on this machine, and for ``plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwenq.models.shapes import ModelShape
from qwenq.planner.estimates import GIB, QuantisationMemory, quantisation_memory
from qwenq.recipe import ON_CPU, ON_GPU

LEAST = (8, 256)
"""Defaults are not made smaller than this: less text says too little about a model."""
USABLE = 0.95
"""Share of a memory that a process can have: the system, or the driver, takes the rest."""


@dataclass(frozen=True)
class CalibrationSize:
    """Sequences of calibration, and the memory that quantising with them takes."""

    samples: int
    seq_len: int
    memory: QuantisationMemory
    limit: int | None = None  # bytes of the memory that they have to fit; None: unknown
    # the defaults that did not fit, and were made smaller; None: none was
    usual: CalibrationSize | None = None

    @property
    def fits(self) -> bool | None:
        """Return whether the memory suffices by the estimate; None where it is not known."""
        return None if self.limit is None else self.memory.peak <= USABLE * self.limit

    @property
    def tokens(self) -> str:
        """Return ``128 × 2048 tokens``."""
        return f"{self.samples} × {self.seq_len} tokens"

    def notices(self, kind: str) -> Iterator[str]:
        """Yield which defaults were made smaller and why, and that memory of this kind may not suffice."""
        if self.limit is None:
            return
        there = f"by estimate; here are {self.limit / GIB:.1f} GiB of {kind}"
        if (usual := self.usual) is not None:
            sizes, peak = f"{usual.samples} × {usual.seq_len}", f"{usual.memory.peak / GIB:.1f} GiB"
            yield f"calibration: {self.tokens} instead of {sizes}, which take {peak} {there}"
        if not self.fits:
            peak = f"{self.memory.peak / GIB:.1f} GiB"
            yield f"memory may not suffice: quantising with {self.tokens} takes {peak} {there}"


def calibration_size(
    shape: ModelShape,
    samples: int | None,
    seq_len: int | None,
    *,
    longest: int | None,
    dtype: str,
    on_gpu: bool,
    limit: int | None,
    ranks: int = 1,
) -> CalibrationSize:
    """Return the sizes that ``quantize`` takes: those that are given, and defaults that fit.

    Defaults are halved, the number of sequences first, until the estimate fits, or they are ``LEAST``.

    Args:
        shape, longest: of the model, and the tokens that it takes.
        samples, seq_len: as the recipe says; None: open.
        dtype: of the forward pass.
        on_gpu, limit: whose defaults and whose memory, in bytes; None: unknown, and the defaults stay.
        ranks: processes that share the sequences, on GPUs with this limit each.
    """

    def sized(pair: tuple[int, int], usual: CalibrationSize | None = None) -> CalibrationSize:
        shared = -(-pair[0] // ranks)
        memory = quantisation_memory(shape, samples=shared, seq_len=pair[1], dtype=dtype, on_gpu=on_gpu)
        return CalibrationSize(*pair, memory, limit, usual)

    usual = ON_GPU if on_gpu else ON_CPU
    first = sized((samples or usual[0], seq_len or min(usual[1], longest or usual[1])))
    found = first
    for pair in _smaller(first, samples, seq_len):
        if found.fits is not False:
            break
        found = sized(pair, first)
    return found


def _smaller(first: CalibrationSize, samples: int | None, seq_len: int | None) -> Iterator[tuple[int, int]]:
    """Yield smaller sizes, of those that are open: fewer sequences, then shorter ones."""
    count, length = first.samples, first.seq_len
    while samples is None and count // 2 >= LEAST[0]:
        count //= 2
        yield count, length
    while seq_len is None and length // 2 >= LEAST[1]:
        length //= 2
        yield count, length
