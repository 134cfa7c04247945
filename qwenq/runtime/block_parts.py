"""What lies between a block's products as several tokens pass it: norms, rotation, the gated activation.

torch takes several passes over memory for each. In bfloat16 and float32, on a CPU that has the instructions,
compiled code takes one (``models.native_block``); it rounds what transformers' blocks round.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from qwenq.models.block_attention import HEAD_STEP
from qwenq.models.block_attention import why_not as why_not_attention
from qwenq.native import support
from qwenq.runtime.rope import rotate
from qwenq.runtime.spec import DecoderSpec


class BlockParts(Protocol):
    """Functions of activations whose first two axes are batch and tokens."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last axis, [..., d]; ``weight`` is [d]."""
        ...

    def rotate(self, qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries and keys [batch, tokens, heads, d], turned; what is given may be changed.

        ``cos`` and ``sin`` are ``Rope.at``'s, [batch or 1, tokens, 1, d].
        """
        ...

    def activate(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) · up`` of [..., 2 · ffn]; [..., ffn]."""
        ...


class TorchParts:
    """Everywhere.

    Args:
        eps: of the norms.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BlockParts`."""
        return rms_norm(x, x.shape[-1:], weight, self._eps)

    def rotate(self, qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `BlockParts`."""
        return rotate(qk, cos, sin)

    def activate(self, gate_up: Tensor) -> Tensor:
        """See `BlockParts`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up


class CompiledParts:
    """In bfloat16 and float32 on the CPU, where ``why_not_compiled`` has no reason.

    Args:
        eps: of the norms.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `BlockParts`."""
        from qwenq.models.native_block import rms_norm

        return rms_norm(x, weight, self._eps)

    def rotate(self, qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `BlockParts`; in place, but by torch where Qwen v1's tables, in float32, meet bfloat16."""
        from qwenq.models.native_block import rotate_

        if cos.dtype is not qk.dtype:
            return rotate(qk, cos, sin)
        first, second = sin.squeeze(2).chunk(2, dim=-1)
        # The code sees to the sign that the table holds for `rope.rotate`; all heads go as queries.
        rotate_(qk, qk[:, :, :0], cos.squeeze(2), torch.cat([-first, second], dim=-1))
        return qk

    def activate(self, gate_up: Tensor) -> Tensor:
        """See `BlockParts`."""
        from qwenq.models.native_block import swiglu

        return swiglu(gate_up)


def block_parts(spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> BlockParts:
    """Compiled ones where they can be."""
    return TorchParts(spec.eps) if why_not_compiled(spec, device, dtype) else CompiledParts(spec.eps)


def why_not_compiled(spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why prompts pass a decoder's blocks without compiled code, in words that follow "because"; None: with.

    Attention over a prompt (``attention.grouped_decode``) asks for the same of the CPU.
    """
    shape = spec.shape
    for width, of in ((shape.hidden, "hidden states"), (shape.ffn, "the MLP")):
        if width % HEAD_STEP:
            return f"the width of {of}, {width}, is no multiple of {HEAD_STEP}"
    return why_not_attention(device, dtype, shape.head_dim)


def passed_over(spec: DecoderSpec, device: torch.device, dtype: torch.dtype) -> str | None:
    """A sentence on compiled code that prompts go without; None: they have it, or none is made for them."""
    if device.type != "cpu" or dtype not in support.FEATURES:
        return None
    why = why_not_compiled(spec, device, dtype)
    return f"prompts take longer than with code compiled for this CPU, because {why}" if why else None
