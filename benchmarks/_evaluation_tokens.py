"""Tokenise the evaluation text: its beginning, as it is.

Usage: ``python _evaluation_tokens.py MODEL TEXT OUT.safetensors SAMPLES SEQ_LEN``. Writes ``tokens``, int64
``[samples, seq_len]``, and ``unk``, bool of that shape: whether it is part of WikiText's mark ``<unk>``.
"""

from __future__ import annotations

import re
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
    found = AutoTokenizer.from_pretrained(model)(
        beginning, add_special_tokens=False, return_offsets_mapping=True
    )
    ids, spans = found["input_ids"][:wanted], found["offset_mapping"][:wanted]
    if len(ids) < wanted:
        sys.exit(f"{text} holds {len(ids)} tokens; {wanted} are needed")
    marked = {place for mark in re.finditer("<unk>", beginning) for place in range(*mark.span())}
    unk = [not marked.isdisjoint(range(*span)) for span in spans]
    shape = (samples, seq_len)
    save_file({"tokens": torch.tensor(ids).view(shape), "unk": torch.tensor(unk).view(shape)}, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
