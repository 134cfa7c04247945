"""Checkpoints as other tools write them: packed word by word, as their formats are described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of a word's eight that nibble 0, 1, … holds."""


def words_of(values: list[int], bits: int) -> list[int]:
    """Integers one after the other in a stream of bits, cut into int32; the lowest bits come first."""
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return [
        word - (1 << 32) if (word := stream >> (32 * i) & 0xFFFFFFFF) >= 1 << 31 else word
        for i in range(count)
    ]


def awq_words(rows: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] → int32 [rows, columns / 8]."""
    packed = [
        [words_of([row[8 * w + c] for c in AWQ_COLUMNS], 4)[0] for w in range(len(row) // 8)]
        for row in rows.tolist()
    ]
    return torch.tensor(packed, dtype=torch.int32)


def packed_words(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, columns] → int32 [rows, columns · bits / 32]."""
    return torch.tensor([words_of(row, bits) for row in rows.tolist()], dtype=torch.int32)


def quantised(
    weight: torch.Tensor, bits: int, group: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers [out, in], zeros and scales [out, groups] of some quantisation of a weight."""
    rows, columns = weight.shape
    groups = columns // group
    scales = (weight.view(rows, groups, group).abs().amax(-1) / (1 << (bits - 1))).half().float() + 1e-3
    scales = scales.half().float()
    zeros = torch.randint(1, (1 << bits) - 1, (rows, groups), generator=generator)
    steps = (weight.view(rows, groups, group) / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return steps.clamp(0, (1 << bits) - 1).flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales


def write_foreign(
    model: Path, out: Path, kind: str, *, bits: int = 4, group: int = 32
) -> dict[str, torch.Tensor]:
    """A folder in which another tool's layout stands for the blocks' weights; returns these weights.

    Args:
        model: an unquantised folder.
        out: a new folder.
        kind: awq, packed, packed-symmetric, mixed, int8, float8, fp8, or autoround with one of its packing
            formats: autoround:auto_gptq, autoround:gptqmodel, autoround:auto_awq.
        bits, group: of awq (4 bits), packed and autoround; mixed has 8 bits in attention, too.
    """
    out.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors, expected = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        own = 8 if kind == "mixed" and "self_attn" in name else bits
        parts, expected[name] = _module(weight.float(), kind, own, group, generator)
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = settings(kind, bits, group)
    (out / "config.json").write_text(json.dumps(config))
    return expected


def _module(
    weight: torch.Tensor, kind: str, bits: int, group: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows, columns = weight.shape
    if kind == "fp8":
        scales = torch.rand(-(-rows // 16), -(-columns // 32), generator=generator) + 0.5
        wide = scales.repeat_interleave(16, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        values = (weight / wide).to(torch.float8_e4m3fn)
        return {"weight": values, "weight_scale_inv": scales}, values.float() * wide
    if kind in ("int8", "float8"):
        scales = weight.abs().amax(1, keepdim=True) / 100
        dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
        values = (weight / scales).round().to(dtype) if kind == "int8" else (weight / scales).to(dtype)
        return {"weight": values, "weight_scale": scales}, values.float() * scales
    integers, zeros, scales = quantised(weight, bits, group, generator)
    if kind in ("packed-symmetric", "mixed"):
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    spread = (integers.view(rows, -1, group).float() - zeros.unsqueeze(-1).float()) * scales.unsqueeze(-1)
    if kind in ("autoround:auto_gptq", "autoround:gptqmodel"):
        stored = zeros - 1 if kind == "autoround:auto_gptq" else zeros
        parts = {
            "qweight": packed_words(integers, bits).t(),
            "qzeros": packed_words(stored.t(), bits),
            "scales": scales.t().half(),
        }
    elif kind.endswith("awq"):
        parts = {
            "qweight": awq_words(integers.t()),
            "qzeros": awq_words(zeros.t()),
            "scales": scales.t().half(),
        }
    else:
        parts = {
            "weight_packed": packed_words(integers, bits),
            "weight_scale": scales.half(),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if kind == "packed":
            parts["weight_zero_point"] = packed_words(zeros.t(), bits).t()
    return parts, spread.flatten(1)


def settings(kind: str, bits: int, group: int) -> dict[str, Any]:
    """quantization_config as the tool writes it."""
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    if kind.startswith("autoround"):
        return {
            "quant_method": "auto-round",
            "packing_format": kind.replace("autoround", "auto_round"),
            "bits": bits,
            "group_size": group,
            "sym": False,
            "data_type": "int",
            "act_bits": 16,
            "autoround_version": "0.16.1",
            "block_name_to_quantize": "model.layers",
        }
    if kind == "fp8":
        return {
            "quant_method": "fp8",
            "weight_block_size": [16, 32],
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
        }
    layouts = {"int8": "int-quantized", "float8": "float-quantized"}
    packed = kind.startswith("packed") or kind == "mixed"
    weights = {
        "num_bits": bits if packed else 8,
        "type": "float" if kind == "float8" else "int",
        "symmetric": kind != "packed",
        "strategy": "group" if packed else "channel",
        "group_size": group if packed else None,
    }
    groups: dict[str, Any] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if not packed:  # in 8 bits the tool quantises activations, too, as they come
        dynamic = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
        groups["group_0"] |= {"input_activations": dynamic, "format": layouts[kind]}
    if kind == "mixed":
        eight = {"targets": ["re:.*self_attn.*"], "weights": weights | {"num_bits": 8}}
        groups = {"group_0": eight, "group_1": groups["group_0"]}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.get(kind, "pack-quantized"),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }
