"""Random packed layers, and what they stand for in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.models.gptq_format import PackedLinear, pack
from qwenq.runtime.linear import LinearShape, Requirements


@dataclass(frozen=True)
class Case:
    """A packed layer, and its exact weight float64 [out, in]."""

    packed: PackedLinear
    weight: Tensor
    need: Requirements


def random_case(
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    *,
    seed: int = 0,
    sym: bool = True,
    shuffled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Case:
    """Scales of either sign; zero points anywhere unless ``sym``; columns in random order if ``shuffled``."""
    generator = torch.Generator().manual_seed(seed)
    top, size = 2**bits - 1, in_features if group_size == -1 else group_size
    groups = in_features // size

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.uint8)

    integers = draw(0, top, out_features, in_features)
    zeros = torch.full((out_features, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = draw(1, top, out_features, groups)
    scales = torch.randn(out_features, groups, generator=generator).mul_(0.02).half()
    packed = pack(integers, scales, zeros, bits)
    if shuffled:
        order = torch.randperm(in_features, generator=generator)
        packed = PackedLinear(packed.qweight, packed.qzeros, packed.scales, packed.g_idx[order])
    columns = packed.g_idx.long()
    weight = (integers.double() - zeros.double()[:, columns]) * scales.double()[:, columns]
    layers = (LinearShape("layer", in_features, out_features),)
    return Case(packed, weight, Requirements(bits, group_size, "gptq", torch.device(device), dtype, layers))
