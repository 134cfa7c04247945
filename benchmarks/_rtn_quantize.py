"""Quantise a checkpoint by rounding to nearest: symmetric, scales from the largest weight of each group.

Usage: ``python _rtn_quantize.py MODEL OUT BITS GROUP_SIZE``. It needs no calibration: the least that any
quantiser has to beat. The last line of the output is JSON: seconds of the whole.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import PackedLinear, pack


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int) -> PackedLinear:
    """``weight``: ``[out, in]``. The scale spans ±max|w| of a group, as AutoGPTQ's does."""
    grouped = weight.float().view(weight.shape[0], -1, group_size)  # [out, groups, group_size]
    scales = grouped.abs().amax(-1).mul(2 / (2**bits - 1)).half().float().clamp_min(2**-14)  # [out, groups]
    middle = 2 ** (bits - 1)
    integers = (grouped / scales[..., None] + middle).round().clamp(0, 2**bits - 1)
    zeros = torch.full_like(scales, middle, dtype=torch.uint8)
    return pack(integers.to(torch.uint8).view_as(weight), scales, zeros, bits)


def tensors(checkpoint: Checkpoint, quant: QuantConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the quantised checkpoint; everything but the blocks' linears as it was."""
    for name in checkpoint.names():
        tensor = checkpoint.read(name)
        if name.startswith("model.layers.") and name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            yield from round_to_nearest(tensor, quant.bits, quant.group_size).tensors(module).items()
        else:
            yield name, tensor


def main(model: Path, out: Path, bits: int, group_size: int) -> None:
    """Read, round, write."""
    start = time.perf_counter()
    checkpoint = open_checkpoint(model)
    quant = QuantConfig(bits=bits, group_size=group_size)
    out.mkdir(parents=True)
    save_file(dict(tensors(checkpoint, quant)), out / "model.safetensors", metadata={"format": "pt"})
    config = checkpoint.config | {"quantization_config": quant.to_config_json()}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for file in model.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(file, out)
    print(json.dumps({"quantise_s": round(time.perf_counter() - start, 3)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
