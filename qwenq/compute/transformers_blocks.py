"""Put our operations into the blocks of transformers: attention, and modules in the place of theirs.

Modules have the same parameters and children under the same names, in the same order, and take and give what
transformers' modules do; linears stay ``nn.Linear``. Results differ from transformers' by float32's rounding
of sums and powers before they are rounded to bfloat16. Source of the structure: ``modeling_llama``,
``modeling_qwen2`` and ``modeling_qwen3`` of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qwenq.compute import attention, block
from qwenq.compute.block import STEP

TORCH, OURS = "sdpa", "qwenq_causal"  # the names under which transformers knows attention

_KNOWN = {
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}DecoderLayer"
    for family in ("Llama", "Qwen2", "Qwen3")
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_SILU = ("silu", "swish")


def attention_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return ``OURS``, registered with transformers, or ``TORCH`` where the C kernel does not run."""
    if attention.unsupported_reason(device, dtype, head_dim) is not None:
        return TORCH
    _register()
    return OURS


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(OURS, attend)
    AttentionMaskInterface.register(OURS, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute attention, [batch, tokens, heads, d], as transformers calls it; under a mask, in torch.

    Keys and values have fewer heads, which query heads share evenly. torch's attention reads the module's
    ``num_key_value_groups`` and ``is_causal``. A mask is that of a window.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None or query.shape[2] != key.shape[2]:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention.causal_attention(query, key, value, scale), None


def fuse_blocks(blocks: Iterable[nn.Module], config: Any) -> str | None:
    """Replace modules of decoder blocks of which ours are known to compute the same.

    Args:
        blocks: transformers' blocks, in bfloat16 or float32, for this CPU; without weights.
        config: transformers' configuration of their model.

    Returns:
        Why they stay transformers' own, in words that follow "because"; None: they are replaced.
    """
    blocks = list(blocks)
    reasons = (_unsupported_reason(one, config) for one in blocks)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        for one in blocks:
            _fuse(one)
    return reason


def _unsupported_reason(module: nn.Module, config: Any) -> str | None:
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" not in _KNOWN:
        return f"there is none for a {kind.__name__}"
    if config.hidden_act not in _SILU:
        return f"there is none for the activation {config.hidden_act}"
    for width, of in ((config.hidden_size, "hidden states"), (config.intermediate_size, "the MLP")):
        if width % STEP:
            return f"the width of {of}, {width}, is not a multiple of {STEP}"
    return None


def _fuse(module: nn.Module) -> None:
    for name in _NORMS:
        setattr(module, name, FusedNorm(getattr(module, name)))
    module.self_attn = FusedAttention(module.self_attn)
    module.mlp = FusedMLP(module.mlp)
    module.eval()


class FusedNorm(nn.Module):
    """An RMSNorm."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = plain.weight
        self.eps = float(plain.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Return […, d] → the same."""
        return block.rms_norm(x, self.weight, self.eps)


class FusedMLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, plain: Any) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, getattr(plain, name))

    def forward(self, x: Tensor) -> Tensor:
        """Return […, hidden] → the same."""
        gate = self.gate_proj(x)
        output: Tensor = self.down_proj(block.swiglu(gate, self.up_proj(x), out=gate))
        return output


class FusedAttention(nn.Module):
    """Attention with rotary positions; with norms of each head where the plain one has them."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: FusedNorm
    k_norm: FusedNorm

    def __init__(self, plain: Any) -> None:
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, FusedNorm(child) if name in _HEAD_NORMS else child)
        self.head_dim, self.scaling = int(plain.head_dim), float(plain.scaling)
        self.num_key_value_groups = int(plain.num_key_value_groups)  # torch's attention under a mask asks
        self.is_causal = bool(plain.is_causal)
        self.sliding_window: int | None = getattr(plain, "sliding_window", None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """Return [batch, tokens, hidden] → the same, and no weights."""
        if rest.pop("cache", past_key_values) is not None:  # as transformers calls it from 5.24 on
            raise ValueError("these blocks keep no keys and values of earlier tokens")
        shape = hidden_states.shape[:-1]
        # [batch, tokens, heads · d] → [batch, tokens, heads, d]
        q, k, v = (
            linear(hidden_states).view(*shape, -1, self.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (table.unsqueeze(2) for table in position_embeddings)  # [batch, tokens, 1, d]
        first, second = sin.chunk(2, dim=-1)
        sin = torch.cat([-first, second], dim=-1)  # the table holds the sign of the rotation
        q, k = block.rotate(q, cos, sin), block.rotate(k, cos, sin)
        mixed, _ = attend(
            self,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attention_mask,
            scaling=self.scaling,
            dropout=0.0,
            sliding_window=self.sliding_window,
            **rest,
        )
        # [batch, tokens, heads, d] → [batch, tokens, heads · d]
        output: Tensor = self.o_proj(mixed.reshape(*shape, -1).contiguous())
        return output, None
