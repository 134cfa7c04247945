"""Choose sizes that suit the device, where a recipe leaves them open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwenq.calibration.dataset import CalibrationSet
from qwenq.calibration.load import LENGTH, load_calibration, require_sizes
from qwenq.calibration.random_tokens import random_tokens
from qwenq.calibration.saved import load_saved
from qwenq.calibration.sequences import Wanted
from qwenq.errors import CalibrationError, UsageError
from qwenq.events import Listener, Notice, counted
from qwenq.models.long_context import longest_plain, require_plain
from qwenq.models.random_weights import is_random
from qwenq.models.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

    from qwenq.models.checkpoint import Checkpoint
    from qwenq.recipe import Recipe


def calibration_for(
    recipe: Recipe,
    checkpoint: Checkpoint,
    vocabulary: int,
    device: torch.device,
    listener: Listener,
) -> CalibrationSet:
    """Load the set or make it.

    Args:
        recipe: says which, and how large.
        checkpoint: whose tokenizer it is for, and who writes it where the source is "self".
        vocabulary: rows of the model's embedding.
        device: where the model writes; a GPU is given more text.
        listener: receives what was chosen, and the progress in tokens.

    Raises:
        CalibrationError: no sound set comes of it, or it has no held-out sequences.
    """
    made = _loaded_or_made(recipe, checkpoint, vocabulary, device, listener)
    facts = made.manifest
    for notice in facts.notices:
        listener(Notice(f"calibration: {notice}"))
    if not facts.held_out:
        raise CalibrationError(
            "this calibration set has no held-out sequences, and the check needs some",
            where=recipe.calibration.source,
            hint="make it again with `qwenq calibrate --held-out 8`",
        )
    if facts.source == "random":
        drawn = f"{facts.samples} × {facts.seq_len} random tokens calibrate them"
        listener(Notice(f"random weights write no text: {drawn}"))
        return made
    own = " (the model's own text: as good as C4 here, and it needs no network)"
    source = f"{facts.source}{own if facts.source == 'self' else ''}"
    made_of = f"{facts.samples} × {facts.seq_len} tokens ({_why_so_many(recipe, device)}) from {source}"
    listener(Notice(f"calibration: {made_of}, {facts.held_out} more held out for the check"))
    return made


def _why_so_many(recipe: Recipe, device: torch.device) -> str:
    wanted = recipe.calibration
    if Path(wanted.source).suffix == ".safetensors":
        return "the sizes of that set"
    if wanted.samples != "auto" or wanted.seq_len != "auto":
        return "as asked" if "auto" not in (wanted.samples, wanted.seq_len) else "in part as asked"
    if device.type == "cuda":
        return "as many as in GPTQ's paper, where the model takes them: a GPU has the time"
    return "few enough for a CPU; a GPU is given 128 × 2048"


def _loaded_or_made(
    recipe: Recipe,
    checkpoint: Checkpoint,
    vocabulary: int,
    device: torch.device,
    listener: Listener,
) -> CalibrationSet:
    wanted = recipe.calibration
    on_gpu = device.type == "cuda"
    saved = Path(wanted.source).suffix == ".safetensors"  # has its own sizes
    samples = (128 if on_gpu else 48) if wanted.samples == "auto" else wanted.samples
    usual = 2048 if on_gpu else 256
    longest = longest_plain(checkpoint.config) or usual
    seq_len = min(usual, longest) if wanted.seq_len == "auto" else wanted.seq_len
    asked = (
        None if saved and wanted.samples == "auto" else samples,
        None if saved and wanted.seq_len == "auto" else seq_len,
        None if saved else wanted.held_out,
    )
    if is_random(checkpoint.config) and (saved or wanted.source == "self"):
        sizes = Wanted(samples=samples, held_out=wanted.held_out, seq_len=seq_len)
        return _without_text(recipe, checkpoint, vocabulary, asked, sizes)
    if is_random(checkpoint.config) and not _has_tokenizer(checkpoint):
        raise UsageError(
            "a model with random weights has no tokenizer to read a text",
            where=wanted.source,
            hint="leave --calibration out: the tokens are random, too",
        )
    label = "writing calibration text" if wanted.source == "self" else "reading calibration text"
    with counted(listener, label, "tokens") as progress:
        return load_calibration(
            wanted.source,
            checkpoint=checkpoint,
            tokenizer=calibration_tokenizer(checkpoint.folder, wanted.thinking),
            samples=asked[0],
            seq_len=asked[1],
            held_out=asked[2],
            seed=recipe.quantize.seed,
            split=wanted.split,
            column=wanted.column,
            device=str(device),
            progress=progress,
        )


def calibration_tokenizer(folder: Path, thinking: str) -> Tokenizer:
    """Return the model's tokenizer; ``on`` and ``off`` reach its chat template as ``enable_thinking``."""
    tokenizer = load_tokenizer(folder)
    return tokenizer if thinking == "auto" else tokenizer.with_thinking(thinking == "on")


def _has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Return whether a model with random weights has a tokenizer in the folder it was written to."""
    return checkpoint.companions is not None and has_tokenizer(checkpoint.companions)


def _without_text(
    recipe: Recipe,
    checkpoint: Checkpoint,
    vocabulary: int,
    asked: tuple[int | None, int | None, int | None],
    sizes: Wanted,
) -> CalibrationSet:
    """Return tokens for a model with random weights: a saved set, of whatever text, or random ones."""
    source = recipe.calibration.source
    if source == "self":
        require_sizes(sizes, checkpoint)
        return random_tokens(vocabulary, sizes, recipe.quantize.seed)
    loaded = load_saved(Path(source), vocabulary, asked)
    require_plain(checkpoint.config, loaded.manifest.seq_len, option=LENGTH, where=source)
    return loaded
