"""Decode Llama and Qwen models, from Qwen v1 to Qwen3.5: load the weights, run new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding

from qwenq.compute import block as ops
from qwenq.errors import UsageError
from qwenq.models import block_shapes
from qwenq.models.checkpoint import Checkpoint
from qwenq.runtime.attention import Attention
from qwenq.runtime.block import (
    Block,
    CompiledStep,
    FullAttention,
    GatedMLP,
    LinearAttention,
    Mixture,
    Operations,
    SharedExpert,
    StepOperations,
    run_blocks,
)
from qwenq.runtime.cache import KVCache, Span, StateShape
from qwenq.runtime.linear import Dense, Linear
from qwenq.runtime.quantised_linear import CpuNative, Int8Head
from qwenq.runtime.spec import DecoderSpec, Rope, logn_scales, read_spec
from qwenq.runtime.weights import Rows, Weights


class Decoder:
    """The whole model, ready to run; the arguments are those of `engine.load`.

    Attributes:
        notes: what a user should know about the choices that were made, one line each.
        compiled: what runs decode steps in one call of C; None: nothing.
        has_step_layout: whether decode steps read the cache in their layout, see `StepLayout`.
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
        self.blocks = _load_blocks(weights, self.spec)
        self.norm = _load_norm(weights, self.spec, "model.norm")
        self.head: Linear = Dense(self.embedding) if checkpoint.tied else weights.linear("lm_head")
        if head == "int8":
            self.head = Int8Head.of(self.head)
        self.has_step_layout: bool = getattr(attention, "has_step_layout", False)
        self.compiled: CompiledStep | None = None
        if self.has_step_layout:
            reason = CompiledStep.unsupported_reason(self.spec, self.blocks)
            if reason is None:
                self.compiled = CompiledStep(self.spec, self.blocks, self.norm, dtype)
            elif dtype is not torch.float16 and self.kernel in (CpuNative.name, Dense.name):
                self.notes = (*self.notes, f"the faster compiled decode step is not used because {reason}")

    def switched(self, *, dynamic_ntk: bool, logn: bool) -> Decoder:
        """Return a decoder over the same weights with Qwen v1's ways beyond its trained length on or off."""
        context = self.spec.long_context
        if context is None:
            raise UsageError("only Qwen v1 models have dynamic NTK and logn to switch")
        other = copy(self)
        other.spec = replace(self.spec, long_context=replace(context, dynamic_ntk=dynamic_ntk, logn=logn))
        other.rope = Rope(other.spec, self.device, self.dtype)
        return other

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache for ``batch`` rows of at most ``capacity`` tokens."""
        shape, linear = self.spec.shape, self.spec.shape.linear_attention
        layers, states = shape.layers, list[StateShape]()
        if linear is not None:
            layers = len(shape.attending)
            recurrent = linear.value_heads, linear.key_dim, linear.value_dim
            states = [StateShape((linear.channels, linear.kernel), recurrent)] * (shape.layers - layers)
        sizes = layers, batch, shape.kv_heads, capacity, shape.head_dim
        return KVCache(*sizes, self.device, self.dtype, states)

    def forward(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run new tokens through all blocks and add them to the cache, see ``Engine.forward``."""
        # Qwen v1 has the NTK factor of the prompt that begins a row, and keeps it.
        fresh = zip(cache.lengths, counts, cache.alphas, strict=True)
        cache.alphas = [alpha if length else self.rope.alpha(count) for length, count, alpha in fresh]
        if self.has_step_layout and ids.shape[1] == 1:
            hidden = self._decode(ids[:, 0], cache).unsqueeze(1)
        else:
            span = cache.span(counts)
            rotation = self.rope.at(span.positions, cache.alphas, span.end)
            scales = self._query_scales(span)
            plain = Operations(self.attend, cache, span, rotation, scales, self.spec)
            hidden = self.run(ids, plain)
        cache.advance(counts)
        return hidden

    def run(self, ids: Tensor, operations: Operations) -> Tensor:
        """Return [..., hidden] after the final norm for tokens [...], by the given operations."""
        return run_blocks(embedding(ids, self.embedding), self.blocks, self.norm, operations)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of [..., hidden], float32 [..., vocabulary]."""
        return self.head(hidden).float()

    def _decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Run one token of each row on a CPU, [batch] → [batch, hidden]."""
        if self.compiled is not None and len(ids) < CompiledStep.most_rows:
            return self.compiled(embedding(ids, self.embedding), cache, self.rope)
        return self.run(ids, StepOperations(cache, self.rope, self.spec))

    def _query_scales(self, span: Span) -> Tensor | None:
        """Return Qwen v1's logn factors [batch or 1, tokens, 1, 1]; None where all are 1."""
        context = self.spec.long_context
        if context is None or not context.logn or span.end <= context.seq_length:
            return None
        return logn_scales(span.positions, context.seq_length).to(self.dtype)[..., None, None]


def _load_blocks(weights: Weights, spec: DecoderSpec) -> list[Block]:
    blocks: list[Block] = []
    done = {True: 0, False: 0}  # layers so far that attend to all earlier tokens, and those that do not
    for number in range(spec.shape.layers):
        prefix = f"model.layers.{number}"
        full = spec.shape.linear_attention is None or number in spec.shape.attending
        load, part = (_load_attention, "self_attn") if full else (_load_linear_attention, "linear_attn")
        blocks.append(
            Block(
                attention_norm=_load_norm(weights, spec, f"{prefix}.input_layernorm"),
                attention=load(weights, spec, f"{prefix}.{part}", done[full]),
                mlp_norm=_load_norm(weights, spec, f"{prefix}.post_attention_layernorm"),
                mlp=_load_mixture(weights, spec, f"{prefix}.mlp")
                if spec.shape.is_mixed(number)
                else _load_mlp(weights, f"{prefix}.mlp"),
            )
        )
        done[full] += 1
    return blocks


def _load_norm(weights: Weights, spec: DecoderSpec, name: str) -> Tensor:
    """Return a norm's weight; hybrids store it less one, and in float32 it is not rounded once more."""
    if spec.shape.linear_attention is not None:
        return 1 + weights.tensor(f"{name}.weight", torch.float32)
    return weights.tensor(f"{name}.weight")


def _load_attention(weights: Weights, spec: DecoderSpec, prefix: str, layer: int) -> FullAttention:
    heads, shared, d = spec.shape.heads, spec.shape.kv_heads, spec.shape.head_dim
    q, k, v = (f"{prefix}.{name}_proj" for name in "qkv")
    out, order = weights.linear(f"{prefix}.o_proj"), spec.head_order
    qk_norm = None
    if spec.shape.qk_norm:
        norms = (_load_norm(weights, spec, f"{prefix}.{name}_norm")[order] for name in "qk")
        qk_norm = torch.cat(
            [norm.expand(many, -1) for norm, many in zip(norms, (heads, shared), strict=True)]
        )
    if not spec.shape.output_gate:
        return FullAttention(weights.linear(q, k, v), qk_norm, out, layer)
    # A head's rows of q_proj are its queries, then its gate.
    queries, gates = torch.arange(2 * heads * d).view(heads, 2, d).unbind(1)
    keys = torch.arange(shared * d).view(shared, d)
    parts = (
        Rows(q, queries[:, order].flatten()),
        Rows(k, keys[:, order].flatten()),
        v,
        Rows(q, gates.flatten()),
    )
    return FullAttention(weights.linear(*parts), qk_norm, out, layer, heads * d)


def _load_linear_attention(weights: Weights, spec: DecoderSpec, prefix: str, layer: int) -> LinearAttention:
    shape = spec.shape.linear_attention
    assert shape is not None  # noqa: S101 - the layer is one
    if shape.fused:  # the rows of a key head lie together: its q, k, v and z; its b and a
        own = shape.value_heads // shape.key_heads
        values = own * shape.value_dim
        qkvz = [_regrouped(f"{prefix}.in_proj_qkvz", shape, (shape.key_dim, shape.key_dim, values, values))]
        rates = [_regrouped(f"{prefix}.in_proj_ba", shape, (own, own))]
    else:
        qkvz, rates = ([Rows(f"{prefix}.in_proj_{name}") for name in names] for names in (("qkv", "z"), "ba"))
    decay, bias, norm, convolution = (
        weights.tensor(f"{prefix}.{name}", torch.float32)
        for name in ("A_log", "dt_bias", "norm.weight", "conv1d.weight")
    )
    return LinearAttention(
        shape=shape,
        qkvz=weights.linear(*qkvz),
        rates=weights.linear(*rates),
        convolution=convolution.squeeze(1).T.contiguous(),
        speed=-decay.exp(),
        bias=bias,
        norm=norm,
        eps=spec.eps,
        out=weights.linear(f"{prefix}.out_proj"),
        layer=layer,
    )


def _regrouped(module: str, shape: block_shapes.LinearAttention, widths: Sequence[int]) -> Rows:
    """Return rows that lie by key head by what they are: ``widths`` are those of each kind in a head."""
    rows = torch.arange(shape.key_heads * sum(widths)).view(shape.key_heads, -1)
    return Rows(module, torch.cat([kind.flatten() for kind in rows.split(list(widths), dim=1)]))


def _load_mlp(weights: Weights, prefix: str) -> GatedMLP:
    gate_up = weights.linear(f"{prefix}.gate_proj", f"{prefix}.up_proj")
    return GatedMLP(gate_up, weights.linear(f"{prefix}.down_proj"))


def _load_mixture(weights: Weights, spec: DecoderSpec, prefix: str) -> Mixture:
    experts = spec.shape.experts
    assert experts is not None  # noqa: S101 - the layer is one
    each = tuple(_load_mlp(weights, f"{prefix}.experts.{number}") for number in range(experts.count))
    shared = None
    if experts.shared_width:
        gate = weights.tensor(f"{prefix}.shared_expert_gate.weight")
        shared = SharedExpert(_load_mlp(weights, f"{prefix}.shared_expert"), gate)
    router = weights.tensor(f"{prefix}.gate.weight")
    return Mixture(router, each, experts.active, spec.normalises_experts, shared)
