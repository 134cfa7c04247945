"""Run a decoder's blocks: the forward pass of a block, written once, over interchangeable operations.

A block is two residual steps: attention over the cache, and the gated MLP or a mixture of some that a router
chooses for each token. q, k and v are one product, gate and up are one. `Operations` is what lies between the
products, for any tokens on any device; `StepOperations` for a decode step on a CPU, `TritonOperations` for
one on a GPU. `CompiledStep` is the whole pass in one call of C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from qwenq.compute import block as ops
from qwenq.compute import delta_rule, dense
from qwenq.compute import step as compute
from qwenq.compute.linear import PackedWeights
from qwenq.models import block_shapes
from qwenq.runtime.attention.plain import Attention, grouped_attention
from qwenq.runtime.cache import KVCache, Span
from qwenq.runtime.linear import Dense, Linear
from qwenq.runtime.quantised_linear import CpuNative
from qwenq.runtime.spec import DecoderSpec, Rope


@dataclass(frozen=True)
class GatedMLP:
    """The MLP of a dense block, or one expert."""

    gate_up: Linear  # hidden → 2 · ffn
    down: Linear  # ffn → hidden

    def __call__(self, x: Tensor, operations: Operations) -> Tensor:
        """Return [..., hidden] for [..., hidden]."""
        return self.down(operations.gated(self.gate_up(x)))

    @property
    def experts(self) -> tuple[GatedMLP, ...]:
        """Return itself, as a mixture its experts."""
        return (self,)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers."""
        return self.gate_up, self.down

    @property
    def step_bytes(self) -> int:
        """Return the bytes that a token reads."""
        return sum(linear.nbytes for linear in self.linears)


@dataclass(frozen=True)
class Mixture:
    """Experts, of which each token takes those that its router finds likeliest."""

    router: Tensor  # [experts, hidden]
    experts: tuple[GatedMLP, ...]  # of one width
    active: int  # how many a token takes
    normalised: bool  # whether their shares are made to add up to one
    shared: SharedExpert | None = None  # what every token takes besides

    def __call__(self, x: Tensor, operations: Operations) -> Tensor:
        """Return the weighted sum of each token's experts, [..., hidden]; no other expert is read."""
        rows = x.reshape(-1, x.shape[-1])
        chosen, shares = self._route(rows)
        numbers, counts = chosen.unique(return_counts=True)
        order = chosen.flatten().argsort(stable=True)  # pairs of a token and its expert, expert by expert
        tokens, shares = order // self.active, shares.flatten()[order].unsqueeze(1)
        total, sizes = torch.zeros_like(rows, dtype=torch.float32), counts.tolist()
        each = numbers.tolist(), tokens.split(sizes), shares.split(sizes)
        for number, mine, share in zip(*each, strict=True):
            found = self.experts[number](rows[mine], operations)
            total.index_add_(0, mine, found.float().mul_(share))
        if self.shared is not None:
            total += self.shared(rows, operations)
        return total.to(x.dtype).view(x.shape)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's experts and their shares, int64 and float32 [tokens, active]."""
        likely = dense.multiply(rows, self.router).softmax(-1, dtype=torch.float32)
        shares, chosen = likely.topk(self.active, dim=-1)
        return chosen, shares / shares.sum(-1, keepdim=True) if self.normalised else shares

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers of all experts."""
        shared = () if self.shared is None else self.shared.mlp.linears
        return (*(linear for expert in self.experts for linear in expert.linears), *shared)

    @property
    def step_bytes(self) -> int:
        """Return the bytes that a token reads."""
        shared = 0 if self.shared is None else self.shared.mlp.step_bytes + self.shared.gate.nbytes
        return self.router.nbytes + self.active * self.experts[0].step_bytes + shared


@dataclass(frozen=True)
class SharedExpert:
    """The expert of all tokens; ``gate`` [1, hidden] gives its share of each."""

    mlp: GatedMLP
    gate: Tensor

    def __call__(self, rows: Tensor, operations: Operations) -> Tensor:
        """Return float32 [rows, hidden]."""
        share = dense.multiply(rows, self.gate).float().sigmoid_()
        return self.mlp(rows, operations).float().mul_(share)


@dataclass(frozen=True)
class FullAttention:
    """Attention to all earlier tokens."""

    qkv: Linear  # hidden → (heads + 2 · key/value heads) · d, and the gate where there is one
    qk_norm: Tensor | None  # [heads + key/value heads, d], each head's RMSNorm weight (Qwen3), else None
    out: Linear
    layer: int  # its number among those with keys and values in the cache
    gate: int = 0  # width of what gates the heads' output (hybrids), else 0

    def __call__(self, x: Tensor, operations: Operations) -> Tensor:
        """Return [..., hidden] for [..., hidden]."""
        qkv = self.qkv(x)
        if not self.gate:
            return self.out(operations.attention(qkv, self.qk_norm, self.layer))
        qkv, gate = qkv.split([qkv.shape[-1] - self.gate, self.gate], dim=-1)
        mixed = operations.attention(qkv, self.qk_norm, self.layer)
        return self.out(mixed.mul_(gate.sigmoid()))

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers."""
        return self.qkv, self.out


@dataclass(frozen=True)
class LinearAttention:
    """Attention with a recurrent state (``compute.delta_rule``), in float32 between its linear layers."""

    shape: block_shapes.LinearAttention
    qkvz: Linear  # hidden → queries, keys, values, and z, which gates the output
    rates: Linear  # hidden → strength and decay of each value head, before they are bounded
    convolution: Tensor  # float32 [width, channels]
    speed: Tensor  # float32 [value heads], the least logarithm of the decay
    bias: Tensor  # float32 [value heads], of the decay
    norm: Tensor  # float32 [value width]
    eps: float  # of the norm
    out: Linear
    layer: int  # its number among those with states in the cache

    def __call__(self, x: Tensor, operations: Operations) -> Tensor:
        """Return [..., hidden] for [..., hidden]."""
        (convolution, recurrent), counts = operations.states(self.layer)
        shape, rows = self.shape, x if x.ndim == 3 else x.unsqueeze(1)  # [batch, tokens, hidden]
        qkv, z = self.qkvz(rows).split([shape.channels, shape.values], dim=-1)
        qkv = delta_rule.convolve(qkv, convolution, self.convolution, counts)
        qk, v = qkv.split([shape.channels - shape.values, shape.values], dim=-1)
        qk = _unit_length(qk.unflatten(-1, (-1, shape.key_dim)))  # [batch, tokens, 2 · key heads, d]
        q, k = qk.repeat_interleave(shape.value_heads // shape.key_heads, dim=2).chunk(2, dim=2)
        strength, decay = self.rates(rows).float().chunk(2, dim=-1)  # [batch, tokens, value heads]
        strength, decay = strength.sigmoid(), self.speed * softplus(decay + self.bias)
        if counts is not None:  # padding leaves the state as it is
            real = (torch.arange(rows.shape[1], device=x.device) < counts.unsqueeze(1)).unsqueeze(2)
            strength, decay = strength * real, decay * real
        mixed = delta_rule.delta_rule(
            q * shape.key_dim**-0.5,
            k,
            v.unflatten(-1, (-1, shape.value_dim)),
            decay,
            strength,
            recurrent,
        )
        mixed = ops.rms_norm(mixed, self.norm, self.eps).flatten(2).mul_(silu(z.float()))
        return self.out(mixed.to(x.dtype)).view(x.shape)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers."""
        return self.qkvz, self.rates, self.out


def _unit_length(x: Tensor) -> Tensor:
    """Return vectors [..., d] of length one; the added number is that of the reference implementation."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt_()


@dataclass(frozen=True)
class Block:
    """Weights of one decoder block."""

    attention_norm: Tensor
    attention: FullAttention | LinearAttention
    mlp_norm: Tensor
    mlp: GatedMLP | Mixture

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers, but for a router."""
        return *self.attention.linears, *self.mlp.linears

    @property
    def step_bytes(self) -> int:
        """Return the bytes of the linear layers, and of a router, that a token reads."""
        return sum(linear.nbytes for linear in self.attention.linears) + self.mlp.step_bytes


def run_blocks(x: Tensor, blocks: Sequence[Block], norm: Tensor, operations: Operations) -> Tensor:
    """Run embedded tokens, [..., hidden], through all blocks and the final norm; ``x`` is overwritten."""
    added = None
    for block in blocks:
        normed = operations.add_norm(x, added, block.attention_norm)
        normed = operations.add_norm(x, block.attention(normed, operations), block.mlp_norm)
        added = block.mlp(normed, operations)
    return operations.add_norm(x, added, norm)


@dataclass
class Operations:
    """What lies between the products of a block, for one pass of new tokens over a cache.

    Here by functions of ``compute.block`` over [batch, tokens, ...], which a graph can capture.
    """

    attend: Attention  # what mixes the cache's values
    cache: KVCache  # written where ``span`` says; its lengths stay as they are
    span: Span  # where the tokens go, and what they may see
    rotation: tuple[Tensor, Tensor]  # cosines and sines, see ``Rope.at``
    query_scales: Tensor | None  # Qwen v1's factors [batch or 1, tokens, 1, 1], or None
    spec: DecoderSpec

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """Add to ``x`` in place, unless it is None, and return the RMSNorm of the sum."""
        if added is not None:
            x += added
        return ops.rms_norm(x, weight, self.spec.eps)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, return the heads' mixed values.

        Args:
            qkv: [..., (heads + 2 · key/value heads) · d]; what is returned is [..., heads · d].
            qk_norm, layer: see `FullAttention`.
        """
        batch, tokens, _ = qkv.shape
        heads, shared = self.spec.shape.heads, self.spec.shape.kv_heads
        qkv = qkv.view(batch, tokens, heads + 2 * shared, self.spec.shape.head_dim)
        qk, values = qkv[:, :, : heads + shared], qkv[:, :, heads + shared :]
        if qk_norm is not None:
            qk = ops.rms_norm(qk, qk_norm, self.spec.eps)
        rotated = ops.rotate(qk, *self.rotation)
        queries, keys = rotated[:, :, :heads], rotated[:, :, heads:]
        if self.query_scales is not None:
            queries = queries * self.query_scales
        keys, values = self.cache.write(layer, keys.transpose(1, 2), values.transpose(1, 2), self.span)
        mixed = self.attend(queries.transpose(1, 2), keys, values, self.span)  # [batch, heads, tokens, d]
        return mixed.transpose(1, 2).reshape(batch, tokens, -1)

    def states(self, layer: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Return a layer's states (convolution, recurrence), and each row's tokens where some are padded."""
        return self.cache.states[layer], self.span.counts

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return ``silu(gate) · up``, [..., 2 · ffn] → [..., ffn]."""
        return ops.swiglu(*gate_up.chunk(2, dim=-1))


class StepOperations(Operations):
    """Operations of a decode step on a CPU, over [batch, ...], with attention in float32.

    A small model spends as long between two products as in them, so there are few calls: the views of the
    cache are made for all layers together, and only rows of unequal length are masked. The cache gets one
    more token in each row; its lengths stay as they are.
    """

    def __init__(self, cache: KVCache, rope: Rope, spec: DecoderSpec) -> None:
        self.cache, self.spec, self._step = cache, spec, cache.step()
        self._cos, self._sin = rope.at_step(self._step.positions, cache.alphas, self._step.end)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """See `Operations`; there is no rotation, span or backend of its own."""
        shape, dtype, step = self.spec.shape, qkv.dtype, self._step
        batch, heads, shared, d = len(qkv), shape.heads, shape.kv_heads, shape.head_dim
        qkv = qkv.float().view(batch, heads + 2 * shared, d)
        qk = qkv[:, : heads + shared]
        if qk_norm is not None:
            variance = qk.square().mean(-1, keepdim=True).add_(self.spec.eps)
            qk = qk * variance.rsqrt_() * qk_norm
        swapped = qk.view(batch, heads + shared, 2, d // 2).flip(2).view(batch, heads + shared, d)
        rotated = (qk * self._cos).addcmul_(swapped, self._sin)
        self.cache.write_step(layer, rotated[:, heads:], qkv[:, heads + shared :], step)
        queries = rotated[:, :heads].reshape(batch * shared, heads // shared, d)
        mixed = grouped_attention(queries, step.keys[layer], step.values[layer], step.mask)
        return mixed.view(batch, heads * d).to(dtype)

    def states(self, layer: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """See `Operations`."""
        return self.cache.states[layer], None

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        gate, up = gate_up.chunk(2, dim=1)
        return silu(gate).mul_(up)


# Run a decode step's operations on a GPU by Triton kernels: three launches where torch takes fifteen.


class TritonOperations(Operations):
    """The same arithmetic over one token of each row, [batch, ...], by three kernels.

    Cosines, sines and positions are [batch, d] and [batch, 1] here, and the query's factors [batch].
    """

    def add_norm(self, x: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See `Operations`."""
        from qwenq.compute.triton.block import add_norm

        return add_norm(x, added, weight, self.spec.eps)

    def attention(self, qkv: Tensor, qk_norm: Tensor | None, layer: int) -> Tensor:
        """See `Operations`."""
        from qwenq.compute.triton.block import rotate_and_store

        stored = self.cache.keys[layer], self.cache.values[layer]
        queries = rotate_and_store(
            qkv, qk_norm, self.rotation, self.query_scales, self.span.positions[:, 0], stored, self.spec.eps
        )
        keys, values = (slots[:, :, : self.span.end] for slots in stored)
        mixed = self.attend(queries, keys, values, self.span)  # [batch, heads, 1, d]
        return mixed.reshape(len(qkv), -1)

    def gated(self, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        from qwenq.compute.triton.block import gated

        return gated(gate_up)


# Run a decode step on a CPU as one call of C, where torch would take a few hundred.


class CompiledStep:
    """A decoder's blocks in one call, for fewer rows than most_rows: with many, torch weighs less."""

    most_rows = CpuNative.many_rows

    def __init__(self, spec: DecoderSpec, blocks: Sequence[Block], norm: Tensor, dtype: torch.dtype) -> None:
        self._run = compute.DecodeStep(
            _shape(spec), [_step_block(each) for each in blocks], norm.float(), dtype
        )

    @staticmethod
    def unsupported_reason(spec: DecoderSpec, blocks: Sequence[Block]) -> str | None:
        """Return why C cannot run these blocks, in words that follow "because"; None: it can."""
        if reason := compute.unsupported_reason(_shape(spec)):
            return reason
        qkv = {id(block.linears[0]) for block in blocks}
        for linear in (linear for block in blocks for linear in block.linears):
            if not isinstance(linear, CpuNative | Dense) or linear.layer is None:
                return f"C multiplies {CpuNative.name}, bfloat16 and float32, and a layer is {linear.name}"
            if isinstance(linear, CpuNative) and (linear.order is not None or linear.offsets is not None):
                return "weights have columns in activation order, or zero points off the middle"
            if linear.bias is not None and id(linear) not in qkv:
                return "there are biases behind attention or in the MLP"
        for block in blocks:
            layers = [_layer(linear) for expert in block.mlp.experts for linear in expert.linears]
            kinds = [(layer.bits >= 16, layer.group_size) for layer in layers]
            if len({*kinds[::2]}) > 1 or len({*kinds[1::2]}) > 1:
                return "the experts of a block have groups of unlike size"
        return None

    def __call__(self, x: Tensor, cache: KVCache, rope: Rope) -> Tensor:
        """Run one embedded token of each row, [batch, hidden]; the cache's lengths stay as they are."""
        keys, values = cache.laid_out_for_step()  # float32 [layers, batch, heads, d, slots], [..., slots, d]
        cos, sin = rope.at_step(cache.next_positions(), cache.alphas, max(cache.lengths) + 1)
        return self._run(x, cos.contiguous(), sin.contiguous(), keys, values, cache.lengths, cache.states)


def _shape(spec: DecoderSpec) -> compute.StepShape:
    shape, experts, linear = spec.shape, spec.shape.experts, spec.shape.linear_attention
    sizes = shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim
    found = compute.StepShape(*sizes, spec.eps, gated=shape.output_gate)
    if experts is not None:
        found = replace(
            found,
            experts=experts.count,
            active=experts.active,
            expert_width=experts.width,
            normalised=spec.normalises_experts,
            shared_width=experts.shared_width,
        )
    if linear is not None:
        names = ("key_heads", "value_heads", "key_dim", "value_dim", "kernel")
        found = replace(found, **{name: getattr(linear, name) for name in names})
    return found


def _layer(linear: Linear) -> PackedWeights:
    return cast(PackedWeights, cast(CpuNative | Dense, linear).layer)


def _step_block(block: Block) -> compute.StepBlock:
    attention, mlp = block.attention, block.mlp
    qkv, qk_norm, recurrence, router, shared = attention.linears[0], None, None, None, None
    if isinstance(attention, LinearAttention):
        vectors = attention.convolution, attention.speed, attention.bias, attention.norm
        recurrence = compute.Recurrence(_layer(attention.rates), *vectors)
    elif attention.qk_norm is not None:
        qk_norm = attention.qk_norm.float().contiguous()
    if isinstance(mlp, Mixture):
        router = mlp.router
        if (one := mlp.shared) is not None:
            shared = _layer(one.mlp.gate_up), _layer(one.mlp.down), one.gate.float().flatten()
    bias = cast(CpuNative | Dense, qkv).bias
    return compute.StepBlock(
        (_layer(qkv), _layer(attention.out)),
        tuple((_layer(expert.gate_up), _layer(expert.down)) for expert in mlp.experts),
        (block.attention_norm.float(), block.mlp_norm.float()),
        None if bias is None else bias.float(),
        qk_norm,
        router,
        shared,
        recurrence,
    )
