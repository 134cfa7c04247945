"""Small models of a family, rounded to nearest and packed, as checkpoints in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from models.plain_qwen_v1 import MemorySource
from runtime.small_models import small_model

from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import PackedLinear, pack


def quantised_model(family: str, quant: QuantConfig, *, seed: int = 0, **changes: Any) -> Checkpoint:
    """Every linear of the blocks packed; with ``desc_act`` the columns of each input in a random order."""
    _, checkpoint = small_model(family, **{"intermediate_size": 128, **changes})
    tensors: dict[str, torch.Tensor] = {}
    for name in checkpoint.names():
        tensor, module = checkpoint.read(name), name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            tensors |= packed_linear(tensor, quant, seed).tensors(module)
        else:
            tensors[name] = tensor
    config = {**checkpoint.config, "quantization_config": {**quant.to_config_json(), "quant_method": "gptq"}}
    return replace(checkpoint, config=config, source=MemorySource(tensors))


def packed_linear(weight: torch.Tensor, quant: QuantConfig, seed: int = 0) -> PackedLinear:
    """[out, in] rounded to nearest."""
    top, middle = 2**quant.bits - 1, 2 ** (quant.bits - 1)
    order = torch.arange(weight.shape[1])
    if quant.desc_act:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    sorted_weight = weight[:, order]
    groups = sorted_weight.view(len(weight), quant.groups(weight.shape[1]), -1)  # [out, groups, group_size]
    scales = (groups.abs().amax(-1) / (middle - 1)).half().float()
    zeros = torch.full(scales.shape, middle, dtype=torch.uint8)
    if not quant.sym:
        zeros += 1
    integers = (groups / scales.unsqueeze(-1)).round().add(zeros.unsqueeze(-1)).clamp(0, top).to(torch.uint8)
    packed = pack(integers.view(weight.shape), scales, zeros, quant.bits, quant.checkpoint_format)
    if not quant.desc_act:
        return packed
    # In the file the columns keep their places, and g_idx says which group each belongs to.
    back = torch.argsort(order)
    stored = integers.view(weight.shape)[:, back]
    again = pack(stored, scales, zeros, quant.bits, quant.checkpoint_format)
    return PackedLinear(again.qweight, packed.qzeros, packed.scales, packed.g_idx[back])
