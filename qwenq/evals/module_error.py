"""Measure the error of each linear's output, and that of rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwenq.models.gptq_config import QuantConfig

MODULE_TOKENS = 512  # enough for two digits of a share of energy, at an eighth of the forward passes' cost
EXPERT_TOKENS = 64  # of each batch, for an expert: a block has hundreds, whose inputs are all kept at once


@dataclass(frozen=True)
class ModuleError:
    """Errors of one linear as shares of its output's energy: ‖(W − Q) x‖² / ‖W x‖² over tokens x.

    Attributes:
        name: "model.layers.0.self_attn.q_proj".
        error: of the quantised weight.
        rtn_error: of plain rounding to nearest at the same bits and group size.
    """

    name: str
    error: float
    rtn_error: float


def chosen_sequences(sequences: int, tokens: int) -> list[int]:
    """Return the sequences whose inputs are used: evenly spread, at most MODULE_TOKENS tokens, at least one.

    They are whole, because the first token of a sequence has extraordinary activations, and must not be
    counted more often than it occurs.
    """
    count = min(sequences, max(1, MODULE_TOKENS // tokens))
    return [index * sequences // count for index in range(count)]


@contextmanager
def captured_inputs(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of the linears ``names`` of a block: name → one [batch, tokens, in] per forward."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda _, args: seen[name].append(args[0])

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def module_error(name: str, weight: Tensor, quantised: Tensor, x: Tensor, quant: QuantConfig) -> ModuleError:
    """Compare a quantised weight and its rounded one on the same inputs.

    Products of bfloat16 inputs are bfloat16's, added up in float32: what is rounded there, each weight's and
    each output's last bits, is a hundred-thousandth of an energy. Others are float32's.

    Args:
        name: of the module.
        weight: float32 [out, in], the base model's.
        quantised: float32 [out, in], what the integers stand for.
        x: [tokens, in], in the dtype that the block ran in.
        quant: bits, group size and symmetry.
    """
    x = x if x.dtype == torch.bfloat16 else x.float()
    energy = _energy(x, weight)
    others = quantised, round_to_nearest(weight, quant)
    return ModuleError(name, *(_energy(x, weight - other) / energy if energy else 0.0 for other in others))


def _energy(x: Tensor, weight: Tensor) -> float:
    return float((x @ weight.to(x.dtype).T).float().square_().sum(dtype=torch.float64))


def round_to_nearest(weight: Tensor, quant: QuantConfig) -> Tensor:
    """Round each weight to the nearest point of the grid that its group's range gives.

    Symmetric: the group's largest magnitude meets the grid's longer side (−2^(bits−1)), so the scale is
    absmax / 2^(bits−1), negative where that weight is positive. Asymmetric: minimum to maximum, with zero.

    Args:
        weight: float32 [out, in].
        quant: bits, group size and symmetry.

    Returns:
        float32 [out, in], dequantised; scales rounded to float16 as a file holds them.
    """
    rows, width = weight.shape
    size = width if quant.group_size == -1 else quant.group_size
    padded = functional.pad(weight, (0, -width % size))  # a last group may be short
    grouped = padded.reshape(rows, -1, size)  # [rows, groups, group_size]
    high, low = grouped.amax(-1, keepdim=True).clamp(min=0), grouped.amin(-1, keepdim=True).clamp(max=0)
    levels, half = 2**quant.bits - 1, 2 ** (quant.bits - 1)
    scale = torch.where(high > -low, -high, -low) / half if quant.sym else (high - low) / levels
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.full_like(scale, half) if quant.sym else (-low / scale).round().clamp(1, levels)
    smallest = torch.finfo(torch.float16).smallest_normal
    stored = torch.where(scale.abs() < smallest, smallest * scale.sign(), scale).half().float()
    integers = (grouped / stored + zero).round().clamp(0, levels)
    return ((integers - zero) * stored).reshape(rows, -1)[:, :width]
