"""Modules in the place of transformers' own in a decoder's blocks, whose parts between products are compiled.

They have the same parameters and children under the same names, in the same order, and take and give what
transformers' modules do; linears stay ``nn.Linear``. Results differ from transformers' by float32's rounding
of sums and powers before they are rounded to bfloat16. Source of the structure: ``modeling_llama``,
``modeling_qwen2`` and ``modeling_qwen3`` of transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qwenq.models.block_attention import HEAD_STEP, attend

_KNOWN = {
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}DecoderLayer"
    for family in ("Llama", "Qwen2", "Qwen3")
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_SILU = ("silu", "swish")


def fuse_blocks(blocks: Iterable[nn.Module], config: Any) -> str | None:
    """Replace modules of decoder blocks of which compiled code is known to compute the same.

    Args:
        blocks: transformers' blocks, in bfloat16 or float32, for this CPU; without weights.
        config: transformers' configuration of their model.

    Returns:
        Why they stay transformers' own, in words that follow "because"; None: they are replaced.
    """
    blocks = list(blocks)
    why = next((why for block in blocks if (why := _why_not(block, config)) is not None), None)
    if why is None:
        for block in blocks:
            _fuse(block)
    return why


def _why_not(block: nn.Module, config: Any) -> str | None:
    kind = type(block)
    if f"{kind.__module__}.{kind.__qualname__}" not in _KNOWN:
        return f"there is none for a {kind.__name__}"
    if config.hidden_act not in _SILU:
        return f"there is none for the activation {config.hidden_act}"
    for width, of in ((config.hidden_size, "hidden states"), (config.intermediate_size, "the MLP")):
        if width % HEAD_STEP:
            return f"the width of {of}, {width}, is no multiple of {HEAD_STEP}"
    return None


def _fuse(block: nn.Module) -> None:
    for name in _NORMS:
        setattr(block, name, FusedNorm(getattr(block, name)))
    block.self_attn = FusedAttention(block.self_attn)
    block.mlp = FusedMLP(block.mlp)
    block.eval()


class FusedNorm(nn.Module):
    """An RMSNorm."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = plain.weight
        self.eps = float(plain.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """[…, d] → the same."""
        from qwenq.models.native_block import rms_norm

        return rms_norm(x, self.weight, self.eps)


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
        """[…, hidden] → the same."""
        from qwenq.models.native_block import swiglu_

        # What a linear gives is nobody else's: the activation may take its place.
        output: Tensor = self.down_proj(swiglu_(self.gate_proj(x), self.up_proj(x)))
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
        """[batch, tokens, hidden] → the same, and no weights.

        Raises:
            ValueError: there are keys of earlier tokens: whole texts pass these blocks.
        """
        from qwenq.models.native_block import rotate_

        if past_key_values is not None:
            raise ValueError("these blocks keep no keys and values of earlier tokens")
        shape = hidden_states.shape[:-1]
        # [batch, tokens, heads · d] → [batch, tokens, heads, d]
        q, k, v = (
            linear(hidden_states).view(*shape, -1, self.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        rotate_(q, k, *position_embeddings)  # fresh from linears or norms, so in place
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
