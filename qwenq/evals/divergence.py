"""Compare two models' predictions token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenq.models.blocks import BlockwiseDecoder

SLAB_TOKENS = 256
ROWS = 32  # of logits that are compared at a time: what is read ten times should stay in a processor's cache
SLAB_ELEMENTS = 1 << 25  # logits of one model at a time: 128 MB in float32 (220 tokens of a 152k vocabulary)


@dataclass(frozen=True)
class TokenScores:
    """Both models' predictions of every token but the first of each sequence; arrays [sequences, tokens − 1].

    Attributes:
        kl: KL(base ‖ quantised) of the predicted distributions, in nats.
        same_top: whether both give the same token the highest probability.
        nll: −log of the probability that the quantised model gave to the token that came, in nats.
        base_nll: the same for the base model.
    """

    kl: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    nll: NDArray[np.float64]
    base_nll: NDArray[np.float64]


def score_tokens(
    base: BlockwiseDecoder,
    quantised: BlockwiseDecoder,
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]],
    batches: Sequence[Tensor],
    step: Callable[[], None],
) -> TokenScores:
    """Run both heads and compare, a slab of tokens at a time.

    Args:
        base, quantised: whose heads to use.
        hidden: the last block's output of base and quantised, [batch, tokens, hidden] per batch.
        batches: int64 [batch, tokens], what the hidden states were made from.
        step: called after each batch.
    """
    slab = max(1, min(SLAB_TOKENS, SLAB_ELEMENTS // base.vocabulary))
    rows = []
    with base.head() as base_head, quantised.head() as head:
        for base_states, states, batch in zip(*hidden, batches, strict=True):
            parts = zip(
                torch.split(base_states[:, :-1].flatten(0, 1), slab),  # [batch · (tokens − 1), hidden]
                torch.split(states[:, :-1].flatten(0, 1), slab),
                torch.split(batch[:, 1:].flatten(), slab),
                strict=True,
            )
            scored = [compare_slab(base_head(b), head(q), t.to(base.device)) for b, q, t in parts]
            rows.append(torch.cat(scored, dim=1).cpu().reshape(4, len(batch), -1))  # [4, batch, tokens − 1]
            step()
    kl, same, nll, base_nll = torch.cat(rows, dim=1).numpy()
    return TokenScores(kl, same.astype(bool), nll, base_nll)


def compare_slab(*logits_and_targets: Tensor) -> Tensor:
    """Return ``compare_logits`` of any number of tokens, computed ``ROWS`` at a time."""
    parts = zip(*(torch.split(x, ROWS) for x in logits_and_targets), strict=True)
    return torch.cat([compare_logits(*part) for part in parts], dim=1)


def compare_logits(base: Tensor, quantised: Tensor, targets: Tensor) -> Tensor:
    """Return KL, same top token (0 or 1), the quantised model's nats and the base's: float64 [4, tokens].

    With a, b the logits less their maximum, Z = Σ exp: KL = Σ exp(a) (a − b) / Zₐ + log Z_b − log Zₐ. Nothing
    overflows, nothing is a logarithm of zero. Summed in float32 it is right to about 1e-6 nats, a tenth of
    what running the models in another float dtype changes.

    Args:
        base, quantised: float32 [tokens, vocabulary]; changed in place.
        targets: int64 [tokens], the token that came.
    """
    (top_a, first_a), (top_b, first_b) = (x.max(-1, keepdim=True) for x in (base, quantised))
    same = (first_a == first_b)[:, 0]
    a, b = base.sub_(top_a), quantised.sub_(top_b)
    picked_a, picked_b = (x.gather(-1, targets[:, None])[:, 0].double() for x in (a, b))
    weights = a.exp()
    z_a = weights.sum(-1).double()
    expected = weights.mul_(a.sub_(b)).sum(-1).double() / z_a
    z_b = b.exp_().sum(-1).double()
    kl = (expected + z_b.log() - z_a.log()).clamp_(min=0)  # below zero is rounding; NaN stays NaN
    return torch.stack([kl, same.double(), z_b.log() - picked_b, z_a.log() - picked_a])
