"""A tiny Qwen v1 chat folder: random weights, a tokenizer of single bytes, ChatML."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from models.plain_qwen_v1 import quantise_v1, random_tensors, small_config, write_v1

from qwenq.models.qwen_tokenizer import RANKS_FILE, SPECIAL_TOKENS

REAL_VOCAB = 256 + len(SPECIAL_TOKENS)


def write_chat_folder(
    folder: Path, *, chat_format: str = "chatml", bits: int | None = None, **changes: Any
) -> Path:
    """The folder; ``bits`` makes it a GPTQ folder."""
    sizes = {"vocab_size": REAL_VOCAB + 16, "seq_length": 4096, "max_position_embeddings": 4096, **changes}
    config = small_config(**sizes)
    tensors = random_tensors(config)
    # Stop ids get a logit of exactly 0, never the largest: a greedy answer does not end by itself.
    tensors["lm_head.weight"][256:259] = 0
    if bits is not None:
        config, tensors = quantise_v1(config, tensors, bits=bits, group_size=16)
    write_v1(folder, config, tensors)
    lines = [base64.b64encode(bytes([value])) + b" %d\n" % value for value in range(256)]
    (folder / RANKS_FILE).write_bytes(b"".join(lines))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": chat_format}))
    return folder
