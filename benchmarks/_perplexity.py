"""How near a checkpoint, quantised or not, is to a text and to its base: one evaluator for every contender.

Usage: ``python _perplexity.py MODEL TOKENS.safetensors [BASE]``. Models run in transformers, in float32; the
weights of a GPTQ folder are dequantised first, so that no kernel's rounding enters. The last line of the
output is JSON:

- ``perplexity``: exp of the mean negative log-likelihood of every token but each row's first;
- ``perplexity_without_unk``: of the tokens that are no part of a mark ``<unk>``, which stands in WikiText for
  a rare word: its context still has them;
- ``kl``, where there is a BASE: KL divergence of its next-token distribution from the model's, mean over all
  positions, in nats; ``kl_by_row``: of each row.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.gptq_format import DequantisedSource
from qwenq.models.source import TensorSource

GRIDS = (".weight_scale", ".weight_zero_point")
"""What llm-compressor leaves beside weights that are already rounded to it."""


def load(folder: Path) -> PreTrainedModel:
    """Return the model in float32, as transformers builds it."""
    checkpoint = open_checkpoint(folder)
    source: TensorSource = checkpoint.source
    if is_quantised(checkpoint.config):
        source = DequantisedSource(source, QuantConfig.read(checkpoint.config), torch.float32)
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = {name: source.read(name) for name in source.names() if not name.endswith(GRIDS)}
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, report = model_class.from_pretrained(  # it stacks what files have for each expert
        None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    if any(report.values()):
        sys.exit(f"{folder}: {report}")
    return model.eval()


@torch.inference_mode()
def quality(
    model: PreTrainedModel, ids: torch.Tensor, unk: torch.Tensor, base: PreTrainedModel | None
) -> dict[str, Any]:
    """Return the figures of the module's docstring.

    Args:
        model: judged.
        ids: int64 ``[samples, seq_len]``.
        unk: bool of that shape: part of a mark.
        base: what it was quantised from.
    """
    losses, divergence = [], []
    for row in ids.split(1):  # [1, seq_len]
        scores = torch.log_softmax(model(row).logits[0], dim=-1)  # [seq_len, vocabulary]
        losses.append(torch.nn.functional.nll_loss(scores[:-1], row[0, 1:], reduction="none"))
        if base is not None:
            expected = torch.log_softmax(base(row).logits[0], dim=-1)
            of_row = torch.nn.functional.kl_div(scores, expected, reduction="sum", log_target=True).item()
            divergence.append(of_row / row.numel())
    loss, text = torch.stack(losses).double(), ~unk[:, 1:]
    found: dict[str, Any] = {
        "perplexity": math.exp(loss.mean()),
        "perplexity_without_unk": math.exp(loss[text].mean()),
    }
    if base is not None:
        found |= {"kl": sum(divergence) / len(divergence), "kl_by_row": divergence}
    return found


def main(model: Path, tokens: Path, base: Path | None = None) -> None:
    """Load, judge, tell."""
    stored = load_file(tokens)
    against = None if base is None else load(base)
    print(json.dumps(quality(load(model), stored["tokens"], stored["unk"], against)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
