"""A GPTQ folder as transformers would run it, were its weights not packed: what engines are held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource


def transformers_model(folder: Path) -> Any:
    """The model that transformers builds from the folder's config, its quantised weights dequantised."""
    checkpoint = open_checkpoint(folder)
    settings = json.loads((folder / "config.json").read_text())
    quant = settings.pop("quantization_config", None)
    source = checkpoint.source
    if quant is not None:
        source = DequantisedSource(source, QuantConfig.read(quant), torch.float32)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: source.read(name).float() for name in source.names()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if checkpoint.tied else [])
    assert surplus == []
    model.tie_weights()
    return model


@torch.inference_mode()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Float32 [tokens, vocabulary] after every token."""
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits
