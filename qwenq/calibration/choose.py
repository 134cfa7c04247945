"""The calibration set that a recipe asks for, with the sizes that suit the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qwenq.calibration.dataset import CalibrationSet
from qwenq.calibration.load import load_calibration
from qwenq.calibration.random_tokens import random_tokens
from qwenq.calibration.saved import load_saved
from qwenq.calibration.sequences import Wanted
from qwenq.errors import CalibrationError
from qwenq.models.random_weights import is_random
from qwenq.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

    from qwenq.models.checkpoint import Checkpoint
    from qwenq.recipe import Recipe


def calibration_for(
    recipe: Recipe,
    checkpoint: Checkpoint,
    vocabulary: int,
    device: torch.device,
    say: Callable[[str], None],
    progress: Callable[[str], Callable[[int, int], None]],
) -> CalibrationSet:
    """Load the set or make it.

    Args:
        recipe: says which, and how large.
        checkpoint: whose tokenizer it is for, and who writes it where the source is "self".
        vocabulary: rows of the model's embedding.
        device: where the model writes; a GPU is given more text.
        say: is told what was chosen.
        progress: begins a step; its result is called with (done, total).

    Raises:
        CalibrationError: no sound set comes of it, or it has no held-out sequences.
    """
    made = _loaded_or_made(recipe, checkpoint, vocabulary, device, progress)
    facts = made.manifest
    if not facts.held_out:
        raise CalibrationError(
            "this calibration set has no held-out sequences, and the check needs some",
            where=recipe.calibration.source,
            hint="make it again with `qwenq calibrate --held-out 8`",
        )
    if facts.source == "random":
        say(f"random weights write no text: {facts.samples} × {facts.seq_len} random tokens calibrate them")
        return made
    own = " (the model's own text: as good as C4 here, and it needs no network)"
    source = f"{facts.source}{own if facts.source == 'self' else ''}"
    made_of = f"{facts.samples} × {facts.seq_len} tokens from {source}"
    say(f"calibration: {made_of}, {facts.held_out} more held out for the check")
    return made


def _loaded_or_made(
    recipe: Recipe,
    checkpoint: Checkpoint,
    vocabulary: int,
    device: torch.device,
    progress: Callable[[str], Callable[[int, int], None]],
) -> CalibrationSet:
    wanted = recipe.calibration
    on_gpu = device.type == "cuda"
    saved = Path(wanted.source).suffix == ".safetensors"  # has its own sizes
    samples = (128 if on_gpu else 48) if wanted.samples == "auto" else wanted.samples
    longest = int(checkpoint.config.get("max_position_embeddings", 2048))
    seq_len = min(2048 if on_gpu else 256, longest) if wanted.seq_len == "auto" else wanted.seq_len
    asked = (
        None if saved and wanted.samples == "auto" else samples,
        None if saved and wanted.seq_len == "auto" else seq_len,
        None if saved else wanted.held_out,
    )
    if is_random(checkpoint.config) and saved:
        return load_saved(Path(wanted.source), vocabulary, asked)
    if is_random(checkpoint.config) and wanted.source == "self":
        sizes = Wanted(samples=samples, held_out=wanted.held_out, seq_len=seq_len)
        return random_tokens(vocabulary, sizes, recipe.quantize.seed)
    label = "writing calibration text" if wanted.source == "self" else "reading calibration text"
    return load_calibration(
        wanted.source,
        checkpoint=checkpoint,
        tokenizer=load_tokenizer(checkpoint.folder),
        samples=asked[0],
        seq_len=asked[1],
        held_out=asked[2],
        seed=recipe.quantize.seed,
        split=wanted.split,
        column=wanted.column,
        device=str(device),
        progress=progress(label),
    )
