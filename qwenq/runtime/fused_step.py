"""Run a decode step's operations on a GPU by Triton kernels: three launches where torch takes fifteen."""

from __future__ import annotations

from torch import Tensor

from qwenq.runtime.attention.plain import Attention
from qwenq.runtime.cache import KVCache
from qwenq.runtime.span import Span
from qwenq.runtime.spec import DecoderSpec


class TritonOperations:
    """The arithmetic of `PlainOperations` over one token of each row, [batch, ...].

    Args:
        attend: what mixes the cache's values.
        cache: written at ``span.positions``; its lengths stay as they are.
        span: of a step whose rows each have their own position.
        rotation: cosines and signed sines, [batch, d] each.
        query_scales: [batch], Qwen v1's factors, or None.
        spec: constants.
    """

    def __init__(
        self,
        attend: Attention,
        cache: KVCache,
        span: Span,
        rotation: tuple[Tensor, Tensor],
        query_scales: Tensor | None,
        spec: DecoderSpec,
    ) -> None:
        from qwenq.runtime.kernels import triton_step

        self._kernels, self._attend, self._cache, self._span = triton_step, attend, cache, span
        self._rotation, self._query_scales, self._eps = rotation, query_scales, spec.eps
        self._positions = span.positions[:, 0]

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See `Operations`."""
        return self._kernels.add_norm(x, added, weight, self._eps)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """See `Operations`."""
        stored = self._cache.keys[layer], self._cache.values[layer]
        queries = self._kernels.rotate_and_store(
            qkv, qk_norm, self._rotation, self._query_scales, self._positions, stored, self._eps
        )
        keys, values = (slots[:, :, : self._span.end] for slots in stored)
        mixed = self._attend(queries, keys, values, self._span)  # [batch, heads, 1, d]
        return mixed.reshape(len(qkv), -1)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        return self._kernels.gated(gate_up)
