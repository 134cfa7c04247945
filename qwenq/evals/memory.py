"""How many rows go through the model at once: as many as fit, and no more than help.

The estimate is coarse, on the safe side, and corrected: what does not fit after all is tried again in halves.
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
_SHARE = 0.5  # of the free memory: other work wants some, too
_ACTIVATIONS = 128  # times one layer's keys and values of a token: what a block holds while it runs
_LOGITS = 4  # copies of a row of float32 logits: themselves, log softmax, published softmax, temporary
_PADDING = 31  # slots by which the layout of decode steps may be longer than the capacity of a cache


@dataclass
class Budget:
    """What one forward pass may take.

    Attributes:
        memory: bytes.
        tokens: new tokens, padding included.
        rows: sequences in a pass.
        cached: bytes of keys and values of one token in all layers.
        computed: bytes that a new token needs while it is computed.
        logits: bytes that the logits of one row need.
        arranged: as ``cached``, in the layout of decode steps, which is filled from the other; 0: has none.
    """

    memory: int
    tokens: int
    rows: int
    cached: int
    computed: int
    logits: int
    arranged: int = 0

    def rows_that_fit(self, longest: int, capacity: int) -> int:
        """Rows of at most ``longest`` new tokens, each in a cache row of ``capacity``; at least one."""
        cache = self._cache(capacity, steps=longest <= 1)  # a pass over one token each is a decode step
        each = cache + longest * (self.computed + capacity * 4) + self.logits
        return max(1, min(self.rows, self.tokens // max(longest, 1), self.memory // each))

    def rows_to_decode(self, capacity: int) -> int:
        """Rows of a cache for writing that take a token each, again and again; at least one."""
        cache = (capacity + _PADDING) * self.arranged if self.arranged else capacity * self.cached
        each = cache + self.computed + self.logits
        return max(1, min(self.rows, self.memory // each))

    def _cache(self, capacity: int, steps: bool) -> int:
        """Bytes of one row of a cache, at most: while it is arranged for decode steps, it is there twice."""
        arranged = (capacity + _PADDING) * self.arranged if steps else 0
        return capacity * self.cached + arranged

    def halve(self, rows: int, error: BaseException) -> None:
        """Take half as many rows from now on.

        Raises:
            QwenqError: a single row did not fit.
        """
        if rows <= 1:
            raise QwenqError(
                "not enough memory for a single prompt", hint="use a smaller model, dtype or prompt"
            ) from error
        self.rows = rows // 2


def budget_for(engine: Engine, batch: int | None = None, decode: bool = False) -> Budget:
    """What is free now, in units of this engine.

    Args:
        engine: loaded already.
        batch: rows that the user wants at most; None: as many as help.
        decode: for writing, where rows take one token at a time.
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
        # Who asks for a number of rows gets them, however long they are, if they fit into memory.
        tokens=(GPU_TOKENS if gpu else CPU_TOKENS) if batch is None else 1 << 40,
        rows=usual if batch is None else batch,
        cached=layer * len(probe.keys),
        computed=layer * _ACTIVATIONS,
        logits=engine.vocab_size * 4 * _LOGITS,
        arranged=arranged,
    )


def cache_for_writing(engine: Engine, rows: int, capacity: int) -> KVCache:
    """An empty cache whose rows are put there ready, then decoded: in the layout of such steps, and no other.

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
    """Whether the device or the process had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indexes by falling length: what needs most memory fails first, and rows of a batch are alike."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
