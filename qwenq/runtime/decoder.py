"""A lean decoder for dense Llama, Qwen2 (Qwen v1 read as Qwen2) and Qwen3.

Every block is two residual steps: attention over the cache, and the gated MLP. q, k and v are one product,
gate and up are one, q and k are normalised and rotated together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.runtime.attention import Attention
from qwenq.runtime.attention.best import Best
from qwenq.runtime.attention.grouped_decode import GroupedDecode
from qwenq.runtime.block_parts import block_parts, passed_over
from qwenq.runtime.cache import KVCache
from qwenq.runtime.compiled_step import CompiledStep
from qwenq.runtime.decode_step import DecodeStep
from qwenq.runtime.kernels.base import Kernel
from qwenq.runtime.kernels.cpu_native import CpuNative
from qwenq.runtime.kernels.int8_head import Int8Head
from qwenq.runtime.linear import Dense, float32_logits
from qwenq.runtime.rope import Rope, logn_scales
from qwenq.runtime.span import Span
from qwenq.runtime.spec import DecoderSpec, read_spec
from qwenq.runtime.weights import Weights

_MEASURED, _STEPS = 256, 5
"""Slots of a cache whose last steps are measured, and how many."""


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block.

    Attributes:
        qkv: hidden → (heads + 2 · key/value heads) · d.
        qk_norm: [heads + key/value heads, d], each head's RMSNorm weight (Qwen3), else None.
        gate_up: hidden → 2 · ffn.
    """

    attention_norm: Tensor
    qkv: Kernel
    qk_norm: Tensor | None
    out: Kernel
    mlp_norm: Tensor
    gate_up: Kernel
    down: Kernel


class Decoder:
    """The whole model, ready to run.

    Args:
        checkpoint: plain or GPTQ weights.
        device: where everything lies.
        dtype: of weights, activations and cache.
        attention: what mixes the cache's values.
        kernel: of the quantised linears, see ``kernels.table``.
        head: ``as-is``, or ``int8`` to round the output head to 8 bits.

    Attributes:
        notes: what a user should know about the choices that were made, one line each.

    Raises:
        UnsupportedError: something of the architecture that this decoder does not have, or a kernel that
            cannot run this model here.
        ModelError: the weights do not fit the config.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        attention: Attention,
        kernel: str = "auto",
        head: str = "as-is",
    ) -> None:
        self.spec: DecoderSpec = read_spec(checkpoint.config)
        self.device, self.dtype, self.attend = device, dtype, attention
        weights = Weights(checkpoint, device, dtype, kernel)
        weights.check(self.spec.shape, checkpoint.tied)
        self.kernel, self.notes = weights.kernel, weights.notes
        self.rope = Rope(self.spec, device, dtype)
        self.parts = block_parts(self.spec, device, dtype)
        if missed := passed_over(self.spec, device, dtype):
            self.notes = (*self.notes, missed)
        self.embedding = weights.tensor("model.embed_tokens.weight")
        self.blocks = [_load_block(weights, self.spec, layer) for layer in range(self.spec.shape.layers)]
        self.norm = weights.tensor("model.norm.weight")
        self.head: Kernel = (
            Dense(self.embedding, shared=True) if checkpoint.tied else weights.linear("lm_head")
        )
        if head == "int8":
            self.head = Int8Head.of(self.head)
        self._step = _decode_step(self)
        if self.kernel == CpuNative.name and isinstance(self._step, DecodeStep):
            why = CompiledStep.unsupported_reason(self)
            self.notes = (*self.notes, f"the faster compiled decode step was passed over: {why}")

    def switched(self, *, dynamic_ntk: bool, logn: bool) -> Decoder:
        """The same weights, shared, with Qwen v1's two ways beyond its trained length on or off.

        Raises:
            UsageError: the model has no such switches.
        """
        context = self.spec.long_context
        if context is None:
            raise UsageError("only Qwen v1 models have dynamic NTK and logn to switch")
        other = copy(self)
        other.spec = replace(self.spec, long_context=replace(context, dynamic_ntk=dynamic_ntk, logn=logn))
        other.rope = Rope(other.spec, self.device, self.dtype)
        other._step = _decode_step(other)
        return other

    @property
    def has_step_layout(self) -> bool:
        """Whether decode steps read the cache in a layout of their own, see ``step_layout``."""
        return self._step is not None

    @property
    def compiled_step(self) -> bool:
        """Whether decode steps are one call of compiled code."""
        return isinstance(self._step, CompiledStep)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` tokens."""
        shape = self.spec.shape
        return KVCache(shape.layers, batch, shape.kv_heads, capacity, shape.head_dim, self.device, self.dtype)

    def forward(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run new tokens through all blocks and add them to the cache.

        Args:
            ids: int64 [batch, tokens]; row r holds ``counts[r]`` tokens, then anything.
            counts: new tokens of each row; at least one.
            cache: what came before.

        Returns:
            [batch, tokens, hidden] after the final norm; rows are meaningless behind their count.

        Raises:
            UsageError: the tokens do not fit into the cache.
        """
        self._fix_alphas(counts, cache)
        if self._step is not None and ids.shape[1] == 1:
            return self._step(ids[:, 0], cache).unsqueeze(1)
        span = cache.span(counts)
        rotation = self.rope.at(span.positions, cache.alphas, span.end)
        hidden = self.run(ids, cache, span, rotation, self._query_scales(span))
        cache.advance(counts)
        return hidden

    def run(
        self,
        ids: Tensor,
        cache: KVCache,
        span: Span,
        rotation: tuple[Tensor, Tensor],
        query_scales: Tensor | None,
    ) -> Tensor:
        """All blocks over a planned pass. Tensors alone decide what happens, so a graph can capture it.

        Args:
            ids: int64 [batch, tokens].
            cache: written where ``span`` says; its lengths stay as they are.
            rotation: cosines and sines, see ``Rope.at``.
            query_scales: [batch or 1, tokens, 1, 1] or None.

        Returns:
            [batch, tokens, hidden] after the final norm.
        """
        x = embedding(ids, self.embedding)
        parts = self.parts
        for layer, block in enumerate(self.blocks):
            normed = parts.norm(x, block.attention_norm)
            x = x + self._attention(normed, block, layer, cache, span, rotation, query_scales)
            x = x + block.down(parts.activate(block.gate_up(parts.norm(x, block.mlp_norm))))
        return parts.norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → float32 [..., vocabulary]."""
        return float32_logits(self.head, hidden)

    def _attention(
        self,
        x: Tensor,
        block: Block,
        layer: int,
        cache: KVCache,
        span: Span,
        rotation: tuple[Tensor, Tensor],
        query_scales: Tensor | None,
    ) -> Tensor:
        batch, tokens, _ = x.shape
        shape = self.spec.shape
        heads, shared = shape.heads, shape.kv_heads
        qkv = block.qkv(x).view(batch, tokens, heads + 2 * shared, shape.head_dim)
        qk, values = qkv[:, :, : heads + shared], qkv[:, :, heads + shared :]
        if block.qk_norm is not None:
            qk = rms_norm(qk, qk.shape[-1:], None, self.spec.eps) * block.qk_norm
        rotated = self.parts.rotate(qk, *rotation)
        queries, keys = rotated[:, :, :heads], rotated[:, :, heads:]
        if query_scales is not None:
            queries = queries * query_scales
        keys, values = cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2), span)
        mixed = self.attend(queries.transpose(1, 2), keys, values, span)  # [batch, heads, tokens, d]
        return block.out(mixed.transpose(1, 2).reshape(batch, tokens, heads * shape.head_dim))

    def _fix_alphas(self, counts: Sequence[int], cache: KVCache) -> None:
        """v1 chooses a row's NTK factor by its prompt, and keeps it for all that follows."""
        fresh = zip(cache.lengths, counts, cache.alphas, strict=True)
        cache.alphas = [alpha if length else self.rope.alpha(count) for length, count, alpha in fresh]

    def _query_scales(self, span: Span) -> Tensor | None:
        """v1's logn factors [batch or 1, tokens, 1, 1], None where all are 1."""
        context = self.spec.long_context
        if context is None or not context.logn or span.end <= context.seq_length:
            return None
        return logn_scales(span.positions, context.seq_length).to(self.dtype)[..., None, None]


def _decode_step(decoder: Decoder) -> DecodeStep | CompiledStep | None:
    """The fastest way to decode one token that this decoder has; None: there is none but the plain one."""
    attend = decoder.attend
    if not isinstance(attend, GroupedDecode) and not (isinstance(attend, Best) and attend.has_grouped):
        return None
    plain = DecodeStep(decoder)
    step = plain if CompiledStep.unsupported_reason(decoder) else CompiledStep(decoder, plain)
    if not isinstance(attend, Best):
        return step
    whole, otherwise = _milliseconds(decoder, step), _milliseconds(decoder, None)
    if whole > otherwise:
        return None
    attend.take_whole_steps(whole, otherwise)
    return step


@torch.inference_mode()
def _milliseconds(decoder: Decoder, step: DecodeStep | CompiledStep | None) -> float:
    """Of one decode step, the shortest of a few after a first that compiles what is compiled."""
    decoder._step = step
    cache, ids, found = decoder.new_cache(1, _MEASURED), torch.zeros(1, 1, dtype=torch.int64), []
    cache.lengths = [_MEASURED - _STEPS]
    for _ in range(_STEPS):
        start = time.perf_counter()
        decoder.forward(ids, [1], cache)
        found.append(1e3 * (time.perf_counter() - start))
    return min(found[1:])


def _load_block(weights: Weights, spec: DecoderSpec, layer: int) -> Block:
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    qk_norm = None
    if spec.shape.qk_norm:
        q, k = weights.tensor(f"{attention}.q_norm.weight"), weights.tensor(f"{attention}.k_norm.weight")
        qk_norm = torch.cat([q.expand(spec.shape.heads, -1), k.expand(spec.shape.kv_heads, -1)])
    return Block(
        attention_norm=weights.tensor(f"{prefix}.input_layernorm.weight"),
        qkv=weights.linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        qk_norm=qk_norm,
        out=weights.linear(f"{attention}.o_proj"),
        mlp_norm=weights.tensor(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=weights.linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        down=weights.linear(f"{mlp}.down_proj"),
    )
