"""Choose how many rows run at once: as many as fit into memory and still gain speed.

The estimate is coarse, on the safe side, and corrected: a batch that does not fit is halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwenq.errors import QwenqError
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import Engine, FastEngine
from qwenq.runtime.memory import free_bytes

CPU_TOKENS, GPU_TOKENS = 512, 16384
"""New tokens in one forward pass from which on more gain nothing."""
CPU_ROWS, GPU_ROWS = 32, 256
"""Rows of a decode step from which on more gain little."""
_SHARE = 0.5  # of the free memory: other work needs some, too
_ACTIVATIONS = 128  # times one layer's keys and values of a token: what a block holds while it runs
_LOGITS = 4  # copies of a row of float32 logits: themselves, log softmax, published softmax, temporary
_PADDING = 31  # slots by which the layout of decode steps may be longer than the capacity of a cache


@dataclass
class Budget:
    """Limits of one forward pass.

    Attributes:
        memory: bytes.
        tokens: new tokens, padding included.
        rows: sequences in a pass.
        cached: bytes of keys and values of one token in all layers.
        computed: bytes that a new token needs while it is computed.
        logits: bytes that the logits of one row need.
        arranged: as ``cached``, in the layout of decode steps, which is filled from the other; 0: none.
    """

    memory: int
    tokens: int
    rows: int
    cached: int
    computed: int
    logits: int
    arranged: int = 0

    def rows_that_fit(self, longest: int, capacity: int) -> int:
        """Return how many rows of ``longest`` new tokens fit, in a cache of ``capacity``; at least one."""
        cache = self._cache(capacity, steps=longest <= 1)  # a pass over one token each is a decode step
        each = cache + longest * (self.computed + capacity * 4) + self.logits
        return max(1, min(self.rows, self.tokens // max(longest, 1), self.memory // each))

    def rows_to_decode(self, capacity: int) -> int:
        """Return how many rows fit that decode a token each; at least one."""
        cache = (capacity + _PADDING) * self.arranged if self.arranged else capacity * self.cached
        each = cache + self.computed + self.logits
        return max(1, min(self.rows, self.memory // each))

    def _cache(self, capacity: int, steps: bool) -> int:
        """Return the largest size of a cache row in bytes, twice while it is rearranged for decode steps."""
        arranged = (capacity + _PADDING) * self.arranged if steps else 0
        return capacity * self.cached + arranged

    def halve(self, rows: int, error: BaseException) -> None:
        """Halve the number of rows from now on.

        Raises:
            QwenqError: a single row did not fit.
        """
        if rows <= 1:
            raise QwenqError(
                "not enough memory for a single prompt", hint="use a smaller model, dtype or prompt"
            ) from error
        self.rows = rows // 2


def budget_for(engine: Engine, batch: int | None = None, decode: bool = False) -> Budget:
    """Return the limits by the memory that is free now.

    Args:
        engine: loaded already.
        batch: rows that the user allows; None: as many as gain speed.
        decode: for decode steps, of one token a row.
    """
    gpu = engine.device.type == "cuda"
    probe = engine.new_cache(1, 1)
    layer = probe.keys[0].nbytes + probe.values[0].nbytes
    arranged = 0
    if _has_step_layout(engine):
        step = probe.step()
        arranged = sum(slot.nbytes for slot in (*step.keys, *step.values))
    usual = (GPU_ROWS if gpu else CPU_ROWS) if decode else (GPU_TOKENS if gpu else CPU_TOKENS)
    return Budget(
        memory=int(free_bytes(engine.device) * _SHARE),
        # A number of rows that the user gave is limited by memory alone, not by their length.
        tokens=(GPU_TOKENS if gpu else CPU_TOKENS) if batch is None else 1 << 40,
        rows=usual if batch is None else batch,
        cached=layer * len(probe.keys),
        computed=layer * _ACTIVATIONS,
        logits=engine.vocab_size * 4 * _LOGITS,
        arranged=arranged,
    )


def cache_for_writing(engine: Engine, rows: int, capacity: int) -> KVCache:
    """Return an empty cache in the layout of decode steps alone, for rows that are prefilled elsewhere.

    Raises:
        OutOfMemoryError: more bytes than are free.
    """
    if not _has_step_layout(engine):
        return engine.new_cache(rows, capacity)
    cache = engine.new_cache(rows, 1)
    cache.arrange_for_steps(capacity)
    return cache


def _has_step_layout(engine: Engine) -> bool:
    return isinstance(engine, FastEngine) and engine.decoder.has_step_layout


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the process had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return indexes by falling length: memory runs out early or never, and rows of a batch are alike."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
