"""A plain reading of the AutoGPTQ layout, as its definition says, independent of qwenq."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return tensors


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 ``[n]`` → ``[n, 32 / bits]``: the value of lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return (words.astype(np.uint32)[..., None] >> shifts) & (2**bits - 1)


def dequantise(tensors: dict[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """float32 ``[out, in]``: scale · (integer − zero), the zero point stored minus one."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{module}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    integers = unpack(qweight.T, bits).reshape(qweight.shape[1], -1)  # [out, in]
    zeros = (unpack(qzeros, bits).reshape(len(qzeros), -1) + 1) & (2**bits - 1)  # [groups, out]
    difference = integers.astype(np.float32) - zeros[g_idx].T.astype(np.float32)
    return torch.from_numpy(difference * scales[g_idx].T.astype(np.float32))


def dequantised_state(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint as float32 weights under the names of a plain model."""
    tensors = read_folder(folder)
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    packed = {f"{module}.{part}" for module in modules for part in ("qweight", "qzeros", "scales", "g_idx")}
    plain = {name: tensor.float() for name, tensor in tensors.items() if name not in packed}
    return plain | {f"{module}.weight": dequantise(tensors, module, bits) for module in modules}
