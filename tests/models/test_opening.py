"""MODEL and --weights: the bundled model, a folder, or a catalogue shape with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model

from qwenq.errors import UsageError
from qwenq.models.opening import open_model
from qwenq.models.random_weights import is_random


def test_a_folder_opens_with_its_stored_weights(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_tiny_model(folder)
    checkpoint = open_model(str(folder))
    assert checkpoint.folder == folder
    assert not is_random(checkpoint.config)


def test_random_weights_take_a_catalogue_shape_and_say_so() -> None:
    checkpoint = open_model("qwen2.5-0.5b-instruct", "random", seed=3)
    assert is_random(checkpoint.config)
    assert any("not for accuracy" in notice for notice in checkpoint.notices)
    name = "model.layers.0.self_attn.k_proj.weight"
    again = open_model("qwen2.5-0.5b-instruct", "random", seed=3)
    other = open_model("qwen2.5-0.5b-instruct", "random", seed=4)
    assert torch.equal(checkpoint.read(name), again.read(name))
    assert not torch.equal(checkpoint.read(name), other.read(name))


def test_a_misspelt_catalogue_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        open_model("qwen2.5-0.5b-instrct", "random")
    assert "qwen2.5-0.5b-instruct" in str(caught.value)


def test_weights_are_stored_or_random() -> None:
    with pytest.raises(UsageError, match="pretty"):
        open_model(None, "pretty")
