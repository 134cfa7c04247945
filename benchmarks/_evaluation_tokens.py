"""Tokenise the evaluation text: its beginning, as it is.

Usage: ``python _evaluation_tokens.py MODEL TEXT OUT.safetensors SAMPLES SEQ_LEN``. Writes one tensor,
``tokens``, int64 ``[samples, seq_len]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

CHARACTERS_PER_TOKEN = 12  # more than any natural text has: what is read suffices, and is not the whole file


def main(model: str, text: Path, out: Path, samples: int, seq_len: int) -> None:
    """Read, tokenise, write."""
    wanted = samples * seq_len
    beginning = text.read_text(encoding="utf-8")[: wanted * CHARACTERS_PER_TOKEN]
    ids = AutoTokenizer.from_pretrained(model)(beginning, add_special_tokens=False)["input_ids"]
    if len(ids) < wanted:
        sys.exit(f"{text} holds {len(ids)} tokens; {wanted} are needed")
    save_file({"tokens": torch.tensor(ids[:wanted], dtype=torch.int64).view(samples, seq_len)}, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
