"""Unpack integers to plain weights on the GPU, for products of many rows by cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_UNPACK_OUTPUTS = 128
_UNPACK_WORDS = 8


@triton.jit
def _unpack(
    words: tl.tensor, scales: tl.tensor, zeros: tl.tensor, weight: tl.tensor,
    outputs: tl.tensor,
    WORDS: tl.constexpr, GROUP_WORDS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_OUT: tl.constexpr,
) -> None:  # fmt: skip
    """Unpack BLOCK_WORDS · BLOCK_OUT words to weights [in, out]; computed in float32, rounded once."""
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    read = (word < WORDS)[:, None] & (out < outputs)[None, :]
    packed = tl.load(words + word[:, None] * outputs + out[None, :], read, 0)
    place = (word // GROUP_WORDS)[:, None] * outputs + out[None, :]
    scale = tl.load(scales + place, read, 0.0).to(tl.float32)
    if SYMMETRIC:
        zero = tl.full([BLOCK_WORDS, BLOCK_OUT], 1 << (BITS - 1), tl.int32)
    else:
        zero = tl.load(zeros + place, read, 0).to(tl.int32)
    for field in tl.static_range(PER_WORD):
        number = ((packed >> (field * BITS)) & MASK) - zero
        value = number.to(tl.float32) * scale
        column = (word * PER_WORD + field).to(tl.int64)[:, None]
        tl.store(weight + column * outputs + out[None, :], value.to(weight.dtype.element_ty), read)


def unpack_weight(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [in, out] in ``dtype``; arguments as of ``multiply_row``."""
    count, outputs = words.shape
    weight = torch.empty((count * 32 // bits, outputs), dtype=dtype, device=words.device)
    with torch.cuda.device_of(words):
        _unpack[(triton.cdiv(outputs, _UNPACK_OUTPUTS), triton.cdiv(count, _UNPACK_WORDS))](
            words, scales, words if zeros is None else zeros, weight, outputs,
            WORDS=count, GROUP_WORDS=count // scales.shape[0], BITS=bits, SYMMETRIC=zeros is None,
            BLOCK_WORDS=_UNPACK_WORDS, BLOCK_OUT=_UNPACK_OUTPUTS, num_warps=4,
        )  # fmt: skip
    return weight
