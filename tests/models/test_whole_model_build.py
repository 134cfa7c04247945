"""One way to a model of transformers' own, for writing text and for the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model
from transformers.utils import logging

from qwenq.errors import ModelError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.transformers_model import build_whole_model, transformers_config


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_as_it_was_even_when_it_fails(shown: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    config = transformers_config(checkpoint.config, tmp_path)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        model = build_whole_model(checkpoint, config, tensors, torch.bfloat16)
        assert (model.dtype, model.training, model.lm_head.weight.requires_grad) == (
            torch.bfloat16,
            False,
            False,
        )
        assert logging.is_progress_bar_enabled() is shown
        tensors["model.norm.weight"] = torch.ones(7)
        with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(7,\)"):
            build_whole_model(checkpoint, config, tensors, torch.bfloat16)
        assert logging.is_progress_bar_enabled() is shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
