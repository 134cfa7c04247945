"""Quantise a checkpoint with AutoRound, its defaults or its recipe `light`; run by ``.venv-autoround``.

Usage: ``python _auto_round_quantize.py MODEL TOKENS.safetensors OUT BITS GROUP_SIZE STEPS``. STEPS of a block
are 200 by default; 50 are those of `light`, which sets a rate of learning, too. Saved as GPTQ.
The last line of the output is JSON: seconds of import, load, quantise and save together.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

RATES = {50: 5e-3}
"""Of the recipes that set one; elsewhere AutoRound chooses it by the number of steps."""


def main(model: str, tokens: str, out: str, bits: int, group_size: int, steps: int) -> None:
    """Import, load, quantise and save; each phase timed."""
    marks = [time.perf_counter()]
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks.append(time.perf_counter())
    ids = load_file(tokens)["tokens"]  # [samples, seq_len], int64
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids.split(1)]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    tuner = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        scheme=f"W{bits}A16",
        group_size=group_size,
        sym=True,
        dataset=calibration,
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        iters=steps,
        lr=RATES.get(steps),
        device_map="cpu",
    )
    marks.append(time.perf_counter())
    parent = Path(f"{out}-saved")  # where it makes a folder of its own, named by the model and the bits
    tuner.quantize_and_save(str(parent), format="auto_gptq")
    (saved,) = (file.parent for file in parent.rglob("config.json"))
    shutil.move(saved, out)
    shutil.rmtree(parent, ignore_errors=True)
    marks.append(time.perf_counter())
    phases = ("import_s", "load_s", "quantise_and_save_s")
    print(json.dumps({name: round(b - a, 3) for name, a, b in zip(phases, marks, marks[1:], strict=False)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
