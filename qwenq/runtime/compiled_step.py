"""One decode step on a CPU with AVX-512 VNNI: all blocks of the decoder in one call of compiled code.

`DecodeStep` computes the same with a few hundred calls of torch, which in a small model take longer than the
products. With many rows the calls weigh less, and `DecodeStep` has them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from qwenq.runtime.cache import KVCache
from qwenq.runtime.kernels.cpu_vnni import CpuVnni, at_once
from qwenq.runtime.kernels.native_layout import (
    BLOCK,
    JOB,
    LINEARS,
    STRETCH,
    VECTORS,
    Shape,
    activation_bytes,
    part_floats,
)

if TYPE_CHECKING:
    from qwenq.runtime.decode_step import DecodeStep
    from qwenq.runtime.decoder import Block, Decoder

_MULTIPLE = 32  # of every width: halves of a head fill registers


class CompiledStep:
    """A decoder's blocks as one piece of code. What a step writes to is kept for the next: one at a time.

    Args:
        decoder: with every linear layer a `CpuVnni`, see `why_not`.
        step: the same in torch: plans the rotation, and runs larger batches.
    """

    def __init__(self, decoder: Decoder, step: DecodeStep) -> None:
        self._decoder, self._step = decoder, step
        self._vectors = [_vectors(block) for block in decoder.blocks]  # the table has their addresses
        self._norm = decoder.norm.float()
        told = []
        for block, vectors in zip(decoder.blocks, self._vectors, strict=True):
            for name in LINEARS:
                told += getattr(block, name).told
            held = [vectors[name] for name in VECTORS]
            told += [0 if vector is None else vector.data_ptr() for vector in held]
        self._blocks = torch.tensor(told, dtype=torch.int64).view(len(decoder.blocks), len(BLOCK))
        self._last: _Room | None = None
        self._alone = Lock()  # compiled code lets other threads of Python run

    @staticmethod
    def why_not(decoder: Decoder) -> str | None:
        """Why not, in words that follow "because"; None: it can."""
        linears = [linear for block in decoder.blocks for linear in _linears(block)]
        if not all(isinstance(linear, CpuVnni) and linear.order is None for linear in linears):
            return f"not every linear layer is a {CpuVnni.name} with its columns as they come"
        if any(linear.offsets is not None for linear in linears):
            return "the weights have zero points off the middle"
        if any(linear.bias is not None for block in decoder.blocks for linear in _linears(block)[1:]):
            return "there are biases behind attention or in the MLP"
        if len({(linear.bits, linear.scale_type) for linear in linears}) > 1:
            return "the linear layers differ in how they are stored"
        shape = decoder.spec.shape
        if shape.head_dim % _MULTIPLE or shape.hidden % _MULTIPLE or shape.ffn % _MULTIPLE:
            return f"sizes are no multiples of {_MULTIPLE}"
        return None

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Int64 [batch] → [batch, hidden] after the final norm; each row of the cache becomes one longer.

        Raises:
            UsageError: a row is full.
        """
        if len(ids) >= CpuVnni.many_rows:
            return self._step(ids, cache)
        with self._alone:
            return self._run(ids, cache)

    def _run(self, ids: Tensor, cache: KVCache) -> Tensor:
        keys, values = cache.laid_out_for_step()  # float32 [layers, batch, heads, d, slots], [..., slots, d]
        cos, sin = self._step.rotation(cache)
        room = self._room(len(ids), keys.shape[-1])
        room.x[: len(ids)] = embedding(ids, self._decoder.embedding)
        room.positions[:] = torch.tensor(cache.lengths)
        y = torch.empty(len(ids), room.x.shape[1], dtype=torch.bfloat16)
        room.run(
            cos=cos.data_ptr(), sin=sin.data_ptr(), rotation_stride=cos[0].numel() if len(cos) > 1 else 0,
            keys=keys.data_ptr(), values=values.data_ptr(), slots=keys.shape[-1], y=y.data_ptr(),
            layer_stride=keys.stride(0), splits=max(cache.lengths) // STRETCH + 1,
        )  # fmt: skip
        cache.advance([1] * cache.batch)
        return y

    def _room(self, rows: int, slots: int) -> _Room:
        room = self._last
        if room is None or not room.serves(rows, slots):
            room = self._last = _Room(self._shape(at_once(rows)), rows, slots, self._blocks, self._norm)
        return room

    def _shape(self, rows: int) -> Shape:
        spec, first = self._decoder.spec, self._decoder.blocks[0]
        shape, qkv = spec.shape, _linears(first)[0]
        return Shape(
            layers=shape.layers, hidden=shape.hidden, ffn=shape.ffn, heads=shape.heads,
            kv_heads=shape.kv_heads, head_dim=shape.head_dim, eps=spec.eps, rows=rows, bits=qkv.bits,
            scales=qkv.scale_type, has_bias=qkv.bias is not None, has_qk_norm=first.qk_norm is not None,
        )  # fmt: skip


class _Room:
    """What a step of so many rows writes to, and its code.

    Args:
        shape: sizes.
        rows: of the batch; what lies behind them is zero and stays so.
        slots: of each row of the cache, at most.
        blocks: addresses and sizes of all linears, int64 [layers, BLOCK].
        norm: float32 [hidden].
    """

    def __init__(self, shape: Shape, rows: int, slots: int, blocks: Tensor, norm: Tensor) -> None:
        self._rows, self._slots, self._threads = rows, slots, torch.get_num_threads()
        heads = shape.heads + 2 * shape.kv_heads
        widest = max(shape.hidden, shape.ffn, shape.heads * shape.head_dim)
        chunks = -(-rows // shape.rows)
        filled = chunks * shape.rows
        self.x = torch.zeros(filled, shape.hidden)
        self.positions = torch.zeros(rows, dtype=torch.int64)
        self._held = {
            "x": self.x,
            "workspace": torch.zeros(activation_bytes(filled, widest, 32), dtype=torch.uint8),
            "qkv": torch.zeros(filled, heads * shape.head_dim),
            "mixed": torch.zeros(filled, shape.heads * shape.head_dim),
            "gate_up": torch.zeros(filled, 2 * shape.ffn),
            "scores": torch.zeros(self._threads, shape.heads // shape.kv_heads, STRETCH),
            "parts": torch.zeros(rows, shape.heads, -(-slots // STRETCH), part_floats(shape.head_dim)),
            "blocks": blocks,
            "positions": self.positions,
            "norm": norm,
        }
        self._job = (ctypes.c_int64 * len(JOB))()
        self._places = {name: place for place, name in enumerate(JOB)}
        self._set({name: tensor.data_ptr() for name, tensor in self._held.items()})
        self._set({"rows": rows, "chunks": chunks})
        self._step = _compiled(shape)

    def serves(self, rows: int, slots: int) -> bool:
        """Whether a step of these sizes has room here."""
        return (rows, torch.get_num_threads()) == (self._rows, self._threads) and slots <= self._slots

    def run(self, **told: int) -> None:
        """One step over a cache."""
        self._set(told)
        self._step(ctypes.addressof(self._job), self._threads)

    def _set(self, told: dict[str, int]) -> None:
        for name, value in told.items():
            self._job[self._places[name]] = value


@cache
def _compiled(shape: Shape) -> Any:
    from qwenq.runtime.kernels.native_decoder import step

    return step(shape)


def _linears(block: Block) -> list[Any]:
    return [block.qkv, block.out, block.gate_up, block.down]


def _vectors(block: Block) -> dict[str, Tensor | None]:
    bias = block.qkv.bias  # type: ignore[attr-defined]  # a CpuVnni, see why_not
    return {
        "attention_norm": block.attention_norm.float(),
        "mlp_norm": block.mlp_norm.float(),
        "qkv_bias": None if bias is None else bias.float(),
        "qk_norm": None if block.qk_norm is None else block.qk_norm.float().contiguous(),
    }
