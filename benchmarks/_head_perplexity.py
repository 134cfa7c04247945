"""What rounding the output head to 8 bits does to the perplexity of a quantised model.

Usage: ``python _head_perplexity.py MODEL TEXT``. Both heads see the same hidden states, of the fast engine in
bfloat16, over the text's first 24 × 512 tokens. The last line of the output is JSON.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from qwenq.models.tokenizer import load_tokenizer
from qwenq.runtime.engine import FastEngine, load
from qwenq.runtime.quantised_linear import Int8Head

SAMPLES, SEQ_LEN = 24, 512


@torch.inference_mode()
def main(folder: Path, text: Path) -> dict[str, float]:
    """Both perplexities."""
    engine = load(folder, device="cpu", dtype="bfloat16")
    assert isinstance(engine, FastEngine)
    heads = {"plain": engine.decoder.head, "int8": Int8Head.of(engine.decoder.head)}
    beginning = text.read_text(encoding="utf-8")[: SAMPLES * SEQ_LEN * 12]
    ids = torch.tensor(load_tokenizer(folder).encode(beginning)[: SAMPLES * SEQ_LEN]).view(SAMPLES, SEQ_LEN)
    totals = dict.fromkeys(heads, 0.0)
    for row in ids:
        hidden = engine.decoder.forward(row[None], [SEQ_LEN], engine.new_cache(1, SEQ_LEN))[0, :-1]
        for name, head in heads.items():
            logits = head(hidden).float()  # [tokens, vocabulary]
            totals[name] += cross_entropy(logits, row[1:], reduction="sum").item()
    count = SAMPLES * (SEQ_LEN - 1)
    return {**{name: math.exp(total / count) for name, total in totals.items()}, "tokens": count}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
