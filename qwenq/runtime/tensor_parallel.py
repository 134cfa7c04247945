"""Run one model on several processes, each with a slice of every matrix, by transformers' plan.

The plan is the model's (``base_model_tp_plan``): heads and columns of the FFN are sharded, one all-reduce
follows attention and one the FFN, the embedding and the head are split over the vocabulary. Rank 0 has an
engine like any other. Before each step it broadcasts what to compute, on the CPU, within the time that the
step takes: the others need to know neither the benchmark nor when it ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from qwenq.distributed import Team
from qwenq.errors import UnsupportedError, UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import is_quantised
from qwenq.models.machine import resolve_device
from qwenq.models.transformers_model import transformers_config
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import find_attention, find_dtype
from qwenq.runtime.transformers_engine import TransformersEngine

END, CACHE, HIDDEN, HEAD = range(4)
"""Messages: the last one; a new cache, in the place of the last; a forward pass over it; the head."""
_FIRST = 32  # numbers in the first part of a message: a decode step of a few rows needs no second


def refuse_unsplittable(checkpoint: Checkpoint, processes: int) -> None:
    """Refuse what transformers' plan cannot shard among so many processes."""
    if find_spec("accelerate") is None:
        raise UnsupportedError(
            "transformers shards a model only where accelerate is installed",
            where="--tp",
            hint="pip install accelerate",
        )
    if is_quantised(checkpoint.config):
        raise UnsupportedError(
            "packed GPTQ weights cannot be split: transformers' tensor-parallel plan slices the weight of a "
            "linear layer, and the kernels here keep packed words, scales and zeros of whole modules",
            where=checkpoint.folder,
            hint="use --tp with the unquantised model; a quantised one usually fits one GPU",
        )
    config = transformers_config(checkpoint.config, checkpoint.folder)
    if not getattr(config, "base_model_tp_plan", None):
        raise UnsupportedError(
            f"transformers has no tensor-parallel plan for {checkpoint.config['model_type']}",
            where=checkpoint.folder,
            hint="leave --tp out",
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, heads) % processes:
            raise UnsupportedError(
                f"{getattr(config, heads)} {heads} cannot be divided evenly among {processes} processes",
                where=checkpoint.folder,
                hint="choose --tp so that it divides both numbers of heads",
            )


class SplitEngine(TransformersEngine):
    """This rank's slice; every method has to be called on all ranks alike, see ``LeadingEngine``."""

    def __init__(
        self, checkpoint: Checkpoint, team: Team, device: str, dtype: str | torch.dtype, attention: str
    ) -> None:
        refuse_unsplittable(checkpoint, team.world)
        torch_device = resolve_device(device)
        if torch_device.type == "cpu" and torch.cuda.is_available():
            raise UsageError(
                "with --tp transformers uses the GPUs wherever there are any",
                where="--device cpu",
                hint="hide them: CUDA_VISIBLE_DEVICES= torchrun …",
            )
        torch_dtype = find_dtype(dtype, torch_device, "transformers")
        name = find_attention(attention, "transformers", torch_device)
        backend = attention_backend(name, torch_device, torch_dtype)
        super().__init__(checkpoint, torch_device, torch_dtype, backend, processes=team.world)
        self._form = super().new_cache(1, 1).form  # known from here on: no further cache is made to learn it
        self._team = team
        self.implementation += f"; its tensor-parallel plan, {team.world} processes"


class LeadingEngine(SplitEngine):
    """Rank 0's engine, which the others follow until ``close``; they keep its newest cache alone."""

    _newest: weakref.ref[KVCache] | None = None

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache of this rank's heads; the others make theirs."""
        _broadcast(self._team, [CACHE, batch, capacity])
        cache = super().new_cache(batch, capacity)
        self._newest = weakref.ref(cache)
        return cache

    def close(self) -> None:
        """End the other ranks' `follow`."""
        _broadcast(self._team, [END])

    def forward(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run new tokens on all ranks."""
        if self._newest is None or self._newest() is not cache:
            raise UnsupportedError("only the newest cache can go on with tensor parallelism, whole")
        rows, tokens = ids.shape
        message = [HIDDEN, cache.capacity, rows, tokens, *cache.lengths, *counts]
        _broadcast(self._team, [*message, *ids.flatten().tolist()])
        return super().forward(ids, counts, cache)

    def head(self, hidden: Tensor) -> Tensor:
        """Return float32 logits, by all ranks."""
        _broadcast(self._team, [HEAD, *hidden.shape])
        _broadcast_tensor(self._team, hidden)
        return super().head(hidden)


@torch.inference_mode()
def follow(engine: SplitEngine, team: Team) -> None:
    """Compute what the leader computes, until it closes its engine."""
    cache = None
    while True:
        kind, *numbers = _receive(team)
        if kind == END:
            return
        if kind == CACHE:
            cache = None  # its memory is free before that of the next is taken
            cache = engine.new_cache(*numbers)
        elif kind == HIDDEN and cache is not None:
            capacity, rows, tokens, *rest = numbers
            cache.reserve(capacity)
            cache.lengths, counts = rest[:rows], rest[rows : 2 * rows]
            ids = torch.tensor(rest[2 * rows :], device=engine.device).view(rows, tokens)
            engine.forward(ids, counts, cache)
        else:
            hidden = torch.empty(numbers, dtype=engine.dtype, device=engine.device)
            _broadcast_tensor(team, hidden)
            engine.head(hidden)


def _broadcast(team: Team, numbers: Sequence[int]) -> None:
    """Broadcast numbers: [their count, numbers …], padded to a first part of fixed length."""
    message = torch.tensor([len(numbers), *numbers])
    first = torch.zeros(_FIRST, dtype=torch.int64)
    first[: len(message)] = message[:_FIRST]
    team.broadcast(first)
    if len(message) > _FIRST:
        team.broadcast(message[_FIRST:].contiguous())


def _receive(team: Team) -> list[int]:
    first = torch.empty(_FIRST, dtype=torch.int64)
    team.broadcast(first)
    length, *numbers = first.tolist()
    if (more := length + 1 - _FIRST) > 0:
        rest = torch.empty(more, dtype=torch.int64)
        team.broadcast(rest)
        numbers += rest.tolist()
    return [int(number) for number in numbers[:length]]


def _broadcast_tensor(team: Team, tensor: Tensor) -> None:
    """Broadcast the leader's values into everybody's tensor, byte by byte."""
    team.broadcast(tensor.contiguous().view(torch.uint8) if team.is_rank0 else tensor.view(torch.uint8))
