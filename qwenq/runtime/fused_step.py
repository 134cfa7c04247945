"""Run a decode step's operations on a GPU by Triton kernels: three launches where torch takes fifteen."""

from __future__ import annotations

from torch import Tensor

from qwenq.runtime.decode_step import PlainOperations


class TritonOperations(PlainOperations):
    """The arithmetic of `PlainOperations` over one token of each row, [batch, ...], by three kernels.

    Cosines, sines and positions are [batch, d] and [batch, 1] here, and the query's factors [batch].
    """

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See `Operations`."""
        from qwenq.runtime.kernels.triton_step import add_norm

        return add_norm(x, added, weight, self.spec.eps)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """See `Operations`."""
        from qwenq.runtime.kernels.triton_step import rotate_and_store

        stored = self.cache.keys[layer], self.cache.values[layer]
        queries = rotate_and_store(
            qkv, qk_norm, self.rotation, self.query_scales, self.span.positions[:, 0], stored, self.spec.eps
        )
        keys, values = (slots[:, :, : self.span.end] for slots in stored)
        mixed = self.attend(queries, keys, values, self.span)  # [batch, heads, 1, d]
        return mixed.reshape(len(qkv), -1)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        from qwenq.runtime.kernels.triton_step import gated

        return gated(gate_up)
