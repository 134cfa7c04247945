"""Random tokens: seeded, inside the vocabulary, no sequence in both parts."""

from __future__ import annotations

import torch

from qwenq.calibration.random_tokens import random_tokens
from qwenq.calibration.sequences import Wanted


def test_the_seed_decides_and_ids_are_in_the_vocabulary() -> None:
    wanted = Wanted(samples=5, held_out=3, seq_len=64)
    made, again, other = (random_tokens(300, wanted, seed) for seed in (0, 0, 1))
    assert made.tokens.shape == (5, 64)
    assert made.held_out.shape == (3, 64)
    assert torch.equal(made.tokens, again.tokens)
    assert made.fingerprint == again.fingerprint != other.fingerprint
    assert int(made.tokens.min()) >= 0
    assert int(made.tokens.max()) < 300
    assert made.manifest.template == "random"
    rows = {tuple(row.tolist()) for row in torch.cat([made.tokens, made.held_out])}
    assert len(rows) == 8
