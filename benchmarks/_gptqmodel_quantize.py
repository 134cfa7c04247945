"""Quantise a checkpoint with GPTQModel and its own defaults; run by the Python of ``.venv-interop``.

Usage: ``python _gptqmodel_quantize.py MODEL TOKENS.safetensors OUT BITS GROUP_SIZE``.
The last line of the output is JSON: seconds of import, load, quantise and save.
"""

from __future__ import annotations

import json
import os
import sys
import time

# Its pool defaults to one worker per two cores, and two cores then fail: two workers asked of a pool of one.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main(model: str, tokens: str, out: str, bits: int, group_size: int) -> None:
    """Import, load, quantise, save; each phase timed."""
    marks = [time.perf_counter()]
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    marks.append(time.perf_counter())
    ids = load_file(tokens)["tokens"]  # [samples, seq_len], int64
    calibration = [
        {"input_ids": row.tolist(), "attention_mask": torch.ones_like(row).tolist()} for row in ids
    ]
    quantised = GPTQModel.load(model, QuantizeConfig(bits=bits, group_size=group_size))
    marks.append(time.perf_counter())
    quantised.quantize(calibration, batch_size=1)
    marks.append(time.perf_counter())
    quantised.save(out)
    marks.append(time.perf_counter())
    phases = ("import_s", "load_s", "quantise_s", "save_s")
    print(json.dumps({name: round(b - a, 3) for name, a, b in zip(phases, marks, marks[1:], strict=False)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
