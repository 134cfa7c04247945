"""Draw random tokens for models with random weights, for which a text would mean nothing."""

from __future__ import annotations

from dataclasses import asdict

import torch

from qwenq.calibration.dataset import CalibrationManifest, CalibrationSet, fingerprint_tokens
from qwenq.calibration.sequences import Wanted
from qwenq.errors import UsageError


def random_tokens(vocabulary: int, wanted: Wanted, seed: int) -> CalibrationSet:
    """Return uniformly drawn ids, [samples, seq_len] and [held_out, seq_len].

    Raises:
        UsageError: a seed that the generator does not take.
    """
    if seed >= 1 << 63:
        raise UsageError(f"the seed {seed} is too large", where="--seed", hint="give one below 2⁶³")
    generator = torch.Generator().manual_seed(seed)
    shape = (wanted.samples + wanted.held_out, wanted.seq_len)
    ids = torch.randint(vocabulary, shape, generator=generator)
    tokens, held_out = ids[: wanted.samples], ids[wanted.samples :]
    manifest = CalibrationManifest(
        source="random",
        template="random",
        seed=seed,
        **asdict(wanted),
        held_out_from="other random streams" if wanted.held_out else "none",
        tokenizer="none",
        tokens=fingerprint_tokens(tokens, held_out),
    )
    return CalibrationSet(tokens, held_out, manifest)
