"""One decode step on a CPU: all blocks of the decoder in one call of C.

`DecodeStep` computes the same with a few hundred calls of torch, which in a small model take longer than the products.
With many rows the calls weigh less, and `DecodeStep` has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.nn.functional import embedding

from qwenq.compute import step as compute
from qwenq.runtime.cache import KVCache
from qwenq.runtime.kernels.cpu_native import CpuNative

if TYPE_CHECKING:
    from qwenq.runtime.decode_step import DecodeStep
    from qwenq.runtime.decoder import Block, Decoder


class CompiledStep:
    """A decoder's blocks in one call.

    Args:
        decoder: with every linear layer a `CpuNative`, see `unsupported_reason`.
        step: the same in torch: plans the rotation, and runs larger batches.
    """

    def __init__(self, decoder: Decoder, step: DecodeStep) -> None:
        self._decoder, self._step = decoder, step
        blocks = [_step_block(block) for block in decoder.blocks]
        self._run = compute.DecodeStep(_shape(decoder), blocks, decoder.norm.float(), decoder.dtype)

    @staticmethod
    def unsupported_reason(decoder: Decoder) -> str | None:
        """Return why not, in words that follow "because"; None: it can."""
        linears = [linear for block in decoder.blocks for linear in _linears(block)]
        if not all(isinstance(linear, CpuNative) and linear.order is None for linear in linears):
            return f"not every linear layer is a {CpuNative.name} with its columns as they come"
        if any(linear.offsets is not None for linear in linears):
            return "the weights have zero points off the middle"
        if any(linear.bias is not None for block in decoder.blocks for linear in _linears(block)[1:]):
            return "there are biases behind attention or in the MLP"
        return compute.unsupported_reason(_shape(decoder))

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Int64 [batch] → [batch, hidden] after the final norm; each row of the cache becomes one longer.

        Raises:
            UsageError: a row is full.
        """
        if len(ids) >= CpuNative.many_rows:
            return self._step(ids, cache)
        keys, values = cache.laid_out_for_step()  # float32 [layers, batch, heads, d, slots], [..., slots, d]
        cos, sin = self._step.rotation(cache)
        y = self._run(
            embedding(ids, self._decoder.embedding), cos.contiguous(), sin.contiguous(), keys, values,
            cache.lengths,
        )  # fmt: skip
        cache.advance([1] * cache.batch)
        return y


def _shape(decoder: Decoder) -> compute.StepShape:
    shape = decoder.spec.shape
    return compute.StepShape(
        shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim, decoder.spec.eps
    )


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
