"""Perplexity of a checkpoint, quantised or not: one evaluator for every contender.

Usage: ``python _perplexity.py MODEL TOKENS.safetensors``. The model runs in transformers, in float32; the
weights of a GPTQ folder are dequantised first, so that no kernel's rounding enters. The last line of the
output is JSON: ``perplexity``, exp of the mean negative log-likelihood of every token but each row's first.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_format import DequantisedSource, QuantConfig, is_quantised
from qwenq.models.source import TensorSource

GRIDS = (".weight_scale", ".weight_zero_point")
"""What llm-compressor leaves beside weights that are already rounded to it."""


def load(folder: Path) -> PreTrainedModel:
    """The model in float32, as transformers builds it."""
    checkpoint = open_checkpoint(folder)
    source: TensorSource = checkpoint.source
    if is_quantised(checkpoint.config):
        source = DequantisedSource(source, QuantConfig.read(checkpoint.config), torch.float32)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: source.read(name) for name in source.names() if not name.endswith(GRIDS)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # absent where it is tied to the embedding
        sys.exit(f"{folder}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """``ids``: int64 ``[samples, seq_len]``."""
    total = 0.0
    for row in ids.split(1):  # [1, seq_len]
        logits = model(row).logits[0, :-1]  # [seq_len - 1, vocabulary]
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return math.exp(total / (ids.shape[0] * (ids.shape[1] - 1)))


if __name__ == "__main__":
    print(json.dumps({"perplexity": perplexity(load(Path(sys.argv[1])), load_file(sys.argv[2])["tokens"])}))
