"""Compute linear attention: a short causal convolution and the gated delta rule, in torch and float32.

A head keeps a matrix S, [key width, value width], where attention keeps keys and values (Yang et al., arXiv
2412.06464). Each token lets it decay, and corrects what it answers to the token's key:

    S ← a S,   S ← S + k ⊗ b (v − Sᵀ k),   output Sᵀ q

One token is these lines. Of a prompt, the corrections of a chunk of tokens are the solution of one triangular
system without S in it: its inverse, and products of matrices, take the place of a loop over tokens.
A token with log a = 0 and b = 0 changes nothing: that is how rows of unlike length share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

CHUNK = 32  # tokens of a prompt that are computed together; of 16, 32, 64 and 128 the fastest on a CPU


def convolve(x: Tensor, state: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return ``silu`` of each channel's convolution over its last inputs, float32 [batch, tokens, channels].

    Args:
        x: [batch, tokens, channels], in the dtype of the state.
        state: [batch, channels, width], the last inputs of each row; those of this pass are put there.
        weight: float32 [width, channels], the newest input's last.
        counts: int64 [batch], tokens of each row that are none of its padding; None: all.
    """
    tokens, width = x.shape[1], len(weight)
    inputs = torch.cat([state.mT, x], dim=1).float()  # [batch, width + tokens, channels]
    mixed = inputs[:, 1 : 1 + tokens] * weight[0]
    for place in range(1, width):
        mixed.addcmul_(inputs[:, 1 + place : 1 + place + tokens], weight[place])
    if counts is None:
        state.copy_(inputs[:, tokens:].mT)
    else:
        last = counts.unsqueeze(1) + torch.arange(width, device=x.device)  # [batch, width]
        state.copy_(inputs.gather(1, last.unsqueeze(2).expand(-1, -1, x.shape[2])).mT)
    return silu(mixed, inplace=True)


def delta_rule(
    queries: Tensor, keys: Tensor, values: Tensor, decay: Tensor, strength: Tensor, state: Tensor
) -> Tensor:
    """Return what the recurrent state answers to each query, [batch, tokens, heads, value width].

    Args:
        queries: float32 [batch, tokens, heads, key width], scaled.
        keys: likewise, of length one.
        values: float32 [batch, tokens, heads, value width].
        decay: float32 [batch, tokens, heads], log a, at most 0.
        strength: float32 [batch, tokens, heads], b.
        state: float32 [batch, heads, key width, value width]; changed to that after the last token.
    """
    parts = queries, keys, values, decay, strength
    if queries.shape[1] == 1:
        return _one_token([part[:, 0] for part in parts], state).unsqueeze(1)
    by_head = (part.transpose(1, 2).split(CHUNK, dim=2) for part in parts)
    found = [_chunk(chunk, state) for chunk in zip(*by_head, strict=True)]
    return torch.cat(found, dim=2).transpose(1, 2)


def _one_token(parts: Sequence[Tensor], state: Tensor) -> Tensor:
    """Return [batch, heads, value width] for one token of each row, [batch, heads, …]."""
    q, k, v, decay, strength = parts
    state.mul_(decay.exp()[..., None, None])
    answers = torch.stack([k, q], dim=-2) @ state  # [batch, heads, 2, value width]: both read it once
    change = strength.unsqueeze(-1) * (v - answers[..., 0, :])
    state.addcmul_(k.unsqueeze(-1), change.unsqueeze(-2))
    return torch.addcmul(answers[..., 1, :], (q * k).sum(-1, keepdim=True), change)


def _chunk(parts: Sequence[Tensor], state: Tensor) -> Tensor:
    """Return [batch, heads, tokens, value width] for tokens of each row, [batch, heads, tokens, …]."""
    q, k, v, decay, strength = parts
    decay, strength = decay.cumsum(-1), strength.unsqueeze(-1)  # from here on: since the chunk's beginning
    since = decay.exp().unsqueeze(-1)
    # What token j is worth at token i, in the lower triangle; the upper one, e^(+…), may not overflow.
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril_().exp_().tril_()
    system = strength * (k @ k.mT) * between  # its diagonal is not read: it is one
    one = torch.eye(k.shape[2], device=k.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    changes: Tensor = inverse @ (strength * (v - since * (k @ state)))
    found: Tensor = ((q @ k.mT) * between) @ changes + (since * q) @ state
    left = (decay[..., -1:] - decay).exp().unsqueeze(-1)  # of a token's change at the chunk's end
    state.mul_(since[..., -1:, :]).add_((left * k).mT @ changes)
    return found
