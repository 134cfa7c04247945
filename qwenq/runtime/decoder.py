"""Decode Llama, Qwen2 (also Qwen v1), Qwen3 and Qwen3-MoE models: load the weights, run new tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding

from qwenq.compute import block as ops
from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.runtime.attention import Attention
from qwenq.runtime.attention.backends import Autotuned
from qwenq.runtime.attention.plain import GroupedDecode
from qwenq.runtime.block import (
    Block,
    CompiledStep,
    GatedMLP,
    Mixture,
    Operations,
    PlainOperations,
    StepOperations,
    run_blocks,
)
from qwenq.runtime.cache import KVCache, Span
from qwenq.runtime.linear import Dense, Linear, float32_logits
from qwenq.runtime.quantised_linear import CpuNative, Int8Head
from qwenq.runtime.spec import DecoderSpec, Rope, logn_scales, read_spec
from qwenq.runtime.weights import Weights

_MEASURED, _STEPS = 256, 5
"""Slots of a cache whose last steps are measured, and how many."""


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
        compiled: what runs decode steps in one call of C; None: nothing.
        has_step_layout: whether decode steps read the cache in their layout, see ``step_layout``.

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
        shape = self.spec.shape
        widths = {"hidden states": shape.hidden, "a head": shape.head_dim}
        if shape.ffn:
            widths["the MLP"] = shape.ffn
        if shape.experts is not None:
            widths["an expert"] = shape.experts.width
        what = "norms, rotary positions, activations and attention of prompts"
        if notice := ops.fallback_notice(what, device, dtype, widths):
            self.notes = (*self.notes, notice)
        self.embedding = weights.tensor("model.embed_tokens.weight")
        self.blocks = [_load_block(weights, self.spec, layer) for layer in range(self.spec.shape.layers)]
        self.norm = weights.tensor("model.norm.weight")
        self.head: Linear = (
            Dense(self.embedding, shared=True) if checkpoint.tied else weights.linear("lm_head")
        )
        if head == "int8":
            self.head = Int8Head.of(self.head)
        self._choose_steps()
        if self.kernel == CpuNative.name and self.has_step_layout and self.compiled is None:
            reason = CompiledStep.unsupported_reason(self.spec, self.blocks)
            self.notes = (*self.notes, f"the faster compiled decode step is not used because {reason}")

    def switched(self, *, dynamic_ntk: bool, logn: bool) -> Decoder:
        """Return a decoder over the same weights with Qwen v1's two ways beyond its trained length on or off.

        Raises:
            UsageError: the model has no such switches.
        """
        context = self.spec.long_context
        if context is None:
            raise UsageError("only Qwen v1 models have dynamic NTK and logn to switch")
        other = copy(self)
        other.spec = replace(self.spec, long_context=replace(context, dynamic_ntk=dynamic_ntk, logn=logn))
        other.rope = Rope(other.spec, self.device, self.dtype)
        other._choose_steps()
        return other

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache for ``batch`` rows of at most ``capacity`` tokens."""
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
        if self.has_step_layout and ids.shape[1] == 1:
            hidden = self._decode(ids[:, 0], cache).unsqueeze(1)
        else:
            span = cache.span(counts)
            rotation = self.rope.at(span.positions, cache.alphas, span.end)
            scales = self._query_scales(span)
            plain = PlainOperations(self.attend, cache, span, rotation, scales, self.spec)
            hidden = self.run(ids, plain)
        cache.advance(counts)
        return hidden

    def run(self, ids: Tensor, operations: Operations) -> Tensor:
        """Return [..., hidden] after the final norm for tokens [...], by the given operations."""
        return run_blocks(embedding(ids, self.embedding), self.blocks, self.norm, operations)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of [..., hidden], float32 [..., vocabulary]."""
        return float32_logits(self.head, hidden)

    def _decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Run one token of each row on a CPU, [batch] → [batch, hidden]."""
        if self.compiled is not None and len(ids) < CompiledStep.most_rows:
            return self.compiled(embedding(ids, self.embedding), cache, self.rope)
        return self.run(ids, StepOperations(cache, self.rope, self.spec))

    def _choose_steps(self) -> None:
        """Choose how decode steps run: compiled, over a cache in their layout, or as prompts do."""
        attend = self.attend
        self.compiled: CompiledStep | None = None
        autotuned = attend if isinstance(attend, Autotuned) and attend.has_grouped else None
        self.has_step_layout = isinstance(attend, GroupedDecode) or autotuned is not None
        if self.has_step_layout and CompiledStep.unsupported_reason(self.spec, self.blocks) is None:
            self.compiled = CompiledStep(self.spec, self.blocks, self.norm, self.dtype)
        if autotuned is not None:
            with_layout = _milliseconds(self)
            self.has_step_layout = False
            without = _milliseconds(self)
            if with_layout <= without:
                self.has_step_layout = True
                autotuned.take_whole_steps(with_layout, without)
            else:
                self.compiled = None

    def _fix_alphas(self, counts: Sequence[int], cache: KVCache) -> None:
        """Choose the NTK factor of rows that begin: Qwen v1 has it of the prompt, and keeps it."""
        fresh = zip(cache.lengths, counts, cache.alphas, strict=True)
        cache.alphas = [alpha if length else self.rope.alpha(count) for length, count, alpha in fresh]

    def _query_scales(self, span: Span) -> Tensor | None:
        """Return Qwen v1's logn factors [batch or 1, tokens, 1, 1]; None where all are 1."""
        context = self.spec.long_context
        if context is None or not context.logn or span.end <= context.seq_length:
            return None
        return logn_scales(span.positions, context.seq_length).to(self.dtype)[..., None, None]


@torch.inference_mode()
def _milliseconds(decoder: Decoder) -> float:
    """Measure a decode step: the shortest of a few after a first that compiles what is compiled."""
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
        mlp=_load_mixture(weights, spec, mlp) if spec.shape.is_mixed(layer) else _load_mlp(weights, mlp),
    )


def _load_mlp(weights: Weights, prefix: str) -> GatedMLP:
    gate_up = weights.linear(f"{prefix}.gate_proj", f"{prefix}.up_proj")
    return GatedMLP(gate_up, weights.linear(f"{prefix}.down_proj"))


def _load_mixture(weights: Weights, spec: DecoderSpec, prefix: str) -> Mixture:
    experts = spec.shape.experts
    assert experts is not None  # noqa: S101 - the layer is one
    each = tuple(_load_mlp(weights, f"{prefix}.experts.{number}") for number in range(experts.count))
    return Mixture(weights.tensor(f"{prefix}.gate.weight"), each, experts.active, spec.normalises_experts)
