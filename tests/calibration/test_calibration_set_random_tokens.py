"""Random tokens: seeded, inside the vocabulary, no sequence in both parts; and what random weights take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from listening import notices_to
from tiny_model import write_tiny_model

from qwenq.calibration.calibration_set import CalibrationSet, random_tokens
from qwenq.calibration.load import calibration_for
from qwenq.calibration.sequences import Sizes
from qwenq.errors import CalibrationError, UsageError
from qwenq.models.random_weights import random_checkpoint
from qwenq.recipe import CalibrationRecipe, Recipe


def test_the_seed_decides_and_ids_are_in_the_vocabulary() -> None:
    wanted = Sizes(samples=5, held_out=3, seq_len=64)
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
    assert made.manifest.held_out_from == "other random streams"
    assert random_tokens(300, Sizes(samples=5, held_out=0, seq_len=64), 0).manifest.held_out_from == "none"


def chosen(source: Path | str, said: list[str] | None = None, **sizes: int) -> CalibrationSet:
    recipe = Recipe(calibration=CalibrationRecipe(source=str(source), **sizes))
    checkpoint = random_checkpoint("qwen2.5-0.5b-instruct", 0, device=torch.device("cpu"))
    told = said if said is not None else []
    return calibration_for(recipe, checkpoint, torch.device("cpu"), notices_to(told))


def test_a_saved_set_for_random_weights_is_taken_as_it_is_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    made = random_tokens(300, Sizes(samples=5, held_out=3, seq_len=64), 0)
    made.save(path)
    assert chosen(path).fingerprint == made.fingerprint
    assert chosen(path, samples=5, seq_len=64).fingerprint == made.fingerprint
    with pytest.raises(UsageError, match="--samples 9 was asked for, but this saved set has 5"):
        chosen(path, samples=9)
    random_tokens(10**6, Sizes(samples=5, held_out=3, seq_len=64), 0).save(tmp_path / "wide.safetensors")
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 151936 ids"):
        chosen(tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match="no such calibration set"):
        chosen(tmp_path / "gone.safetensors")
    random_tokens(300, Sizes(samples=5, held_out=0, seq_len=64), 0).save(path)
    with pytest.raises(CalibrationError, match="no held-out sequences"):
        chosen(path)


def test_random_tokens_are_reported_in_a_notice() -> None:
    said: list[str] = []
    assert chosen("self", said=said, samples=2, seq_len=16).tokens.shape == (2, 16)
    assert said == ["random weights write no text: 2 × 16 random tokens calibrate them"]


def test_a_folder_named_like_the_catalogue_model_lends_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of random weights lies on no disk: ``random-weights`` here is somebody else's."""
    write_tiny_model(tmp_path / "random-weights")
    (tmp_path / "text.txt").write_text("some text " * 1000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="random weights has no tokenizer"):
        chosen("text.txt")


def test_a_seed_of_64_bits_is_refused() -> None:
    wanted = Sizes(samples=1, held_out=1, seq_len=4)
    assert random_tokens(300, wanted, 2**63 - 1).tokens.shape == (1, 4)
    with pytest.raises(UsageError, match="the seed 9223372036854775808 is too large"):
        random_tokens(300, wanted, 2**63)
