"""Open what the user named as a checkpoint: a folder, a hub id, the bundled model, or random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.resolve import resolve_model

Weights = Literal["stored", "random"]
WEIGHTS_HELP = "stored, or random: a catalogue model such as qwen-7b-chat with seeded random weights."


def open_model(model: str | None, weights: str = "stored", seed: int = 0) -> Checkpoint:
    """Open MODEL; its ``notices`` say how it was found.

    Args:
        model: a folder, a hub id, None for the bundled model; with random weights a catalogue name.
        weights: "stored" or "random" (nothing is read or written: tensors are drawn as they are asked for).
        seed: of random weights.

    Raises:
        UsageError: no such model or catalogue name; ``weights`` is neither.
        QwenqError: the model cannot be read.
    """
    if weights == "stored":
        resolved = resolve_model(model)
        checkpoint = open_checkpoint(resolved.folder)
        return replace(checkpoint, notices=[*resolved.notices, *checkpoint.notices])
    if weights != "random":
        raise UsageError(f"{weights!r} weights", where="--weights", hint="use stored or random")
    from qwenq.models import catalogue
    from qwenq.models.random_weights import random_checkpoint

    name = model or catalogue.BUNDLED
    notice = f"random weights (seed {seed}) in the shape of {name}: for speed and memory, not for accuracy"
    return replace(random_checkpoint(name, seed), notices=[notice])


def refuse_random_weights(weights: str) -> None:
    """Refuse ``--weights random`` in a command that judges a model: random ones have no accuracy.

    Raises:
        UsageError: ``weights`` is "random".
    """
    if weights == "random":
        raise UsageError(
            "random weights: accuracy would mean nothing",
            where="--weights",
            hint="name a model with real weights; `qwenq profile` and `qwenq plan` take random ones",
        )
