"""Run a decode step on a CPU as one call of C, where torch would take a few hundred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qwenq.compute import step as compute
from qwenq.runtime.cache import KVCache
from qwenq.runtime.decode_step import Block
from qwenq.runtime.kernels.cpu_native import CpuNative
from qwenq.runtime.rope import Rope
from qwenq.runtime.spec import DecoderSpec


class CompiledStep:
    """A decoder's blocks in one call, for fewer rows than ``most_rows``: with many, torch's calls weigh less.

    Args:
        spec: sizes and constants.
        blocks: with every linear layer a `CpuNative`, see `unsupported_reason`.
        norm: weight of the final norm.
        dtype: of the activations.
    """

    most_rows = CpuNative.many_rows

    def __init__(self, spec: DecoderSpec, blocks: Sequence[Block], norm: Tensor, dtype: torch.dtype) -> None:
        self._run = compute.DecodeStep(
            _shape(spec), [_step_block(each) for each in blocks], norm.float(), dtype
        )

    @staticmethod
    def unsupported_reason(spec: DecoderSpec, blocks: Sequence[Block]) -> str | None:
        """Return why C cannot run these blocks, in words that follow "because"; None: it can."""
        linears = [linear for block in blocks for linear in _linears(block)]
        if not all(isinstance(linear, CpuNative) and linear.order is None for linear in linears):
            return f"not every linear layer is a {CpuNative.name} with its columns as they come"
        if any(linear.offsets is not None for linear in linears):
            return "the weights have zero points off the middle"
        if any(linear.bias is not None for block in blocks for linear in _linears(block)[1:]):
            return "there are biases behind attention or in the MLP"
        return compute.unsupported_reason(_shape(spec))

    def __call__(self, x: Tensor, cache: KVCache, rope: Rope) -> Tensor:
        """Run one embedded token of each row, [batch, hidden]; the cache's lengths stay as they are.

        Raises:
            UsageError: a row is full.
        """
        keys, values = cache.laid_out_for_step()  # float32 [layers, batch, heads, d, slots], [..., slots, d]
        cos, sin = rope.at_step(cache.next_positions(), cache.alphas, max(cache.lengths) + 1)
        return self._run(x, cos.contiguous(), sin.contiguous(), keys, values, cache.lengths)


def _shape(spec: DecoderSpec) -> compute.StepShape:
    shape = spec.shape
    sizes = shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim
    return compute.StepShape(*sizes, spec.eps)


def _linears(block: Block) -> list[Any]:
    return [block.qkv, block.out, block.gate_up, block.down]


def _step_block(block: Block) -> compute.StepBlock:
    qkv, out, gate_up, down = (cast(CpuNative, linear).layer for linear in _linears(block))
    bias = cast(CpuNative, block.qkv).bias
    vectors = (
        block.attention_norm.float(),
        block.mlp_norm.float(),
        None if bias is None else bias.float(),
        None if block.qk_norm is None else block.qk_norm.float().contiguous(),
    )
    return compute.StepBlock((qkv, out, gate_up, down), vectors)
