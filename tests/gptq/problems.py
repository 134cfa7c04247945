"""Layers to quantise: weights, and inputs whose features are as correlated and uneven as a real model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwenq.gptq.settings import Settings
from qwenq.recipe import QuantizeRecipe


@dataclass(frozen=True)
class Problem:
    """W [rows, in], X [tokens, in] and H = 2/n XᵀX, one dtype."""

    W: Tensor
    X: Tensor
    H: Tensor


def problem(
    seed: int, rows: int = 24, width: int = 64, tokens: int = 256, dtype: torch.dtype = torch.float32
) -> Problem:
    """Seeded; H is of full rank where tokens > width."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draw, dtype=torch.float64)
    spread = torch.logspace(0, -1, width, dtype=torch.float64)[torch.randperm(width, generator=draw)]
    X = (torch.randn(tokens, width, generator=draw, dtype=torch.float64) @ mixing / width**0.5) * spread
    W = torch.randn(rows, width, generator=draw, dtype=torch.float64) * 0.02
    H = 2 / tokens * X.T @ X
    return Problem(W.to(dtype), X.to(dtype), H.to(dtype))


def usual(**changes: Any) -> Settings:
    """The recipe's defaults, Int4, groups of 32; ``changes`` go over them."""
    return replace(Settings.from_recipe(QuantizeRecipe(bits=4)), **{"group_size": 32, **changes})
