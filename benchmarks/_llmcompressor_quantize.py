"""Quantise a checkpoint with llm-compressor's GPTQ and its own defaults; run by ``.venv-llmcompressor``.

Usage: ``python _llmcompressor_quantize.py MODEL TOKENS.safetensors OUT BITS GROUP_SIZE``.
What is saved are plain weights, rounded to the grid: its own format is another one, and takes no longer.
The last line of the output is JSON: seconds of import, load, quantise and save.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(model: str, tokens: str, out: str, bits: int, group_size: int) -> None:
    """Import, load, quantise, save; each phase timed."""
    marks = [time.perf_counter()]
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    marks.append(time.perf_counter())
    ids = load_file(tokens)["tokens"]  # [samples, seq_len], int64
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * ids.shape[0]}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    marks.append(time.perf_counter())
    weights = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict(rows),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    marks.append(time.perf_counter())
    loaded.save_pretrained(out, save_compressed=False)
    call_plain(Path(out) / "config.json")
    marks.append(time.perf_counter())
    phases = ("import_s", "load_s", "quantise_s", "save_s")
    print(json.dumps({name: round(b - a, 3) for name, a, b in zip(phases, marks, marks[1:], strict=False)}))


def call_plain(config: Path) -> None:
    """Weights that lie on a grid are weights like others: whoever evaluates them need not know the grid."""
    known = json.loads(config.read_text(encoding="utf-8"))
    del known["quantization_config"]
    config.write_text(json.dumps(known), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
