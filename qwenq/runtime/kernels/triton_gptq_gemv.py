"""Multiply one row by packed integers, as a decode step does: few instructions a weight, at memory's speed.

A field of b bits at bit s of a word becomes a float32 by one operation: masked and put below the
exponent of 2^23 it reads 2^23 + q · 2^s, exactly. One subtraction leaves (q - zero) · 2^s, one
multiply-add does the rest, with 2^-s taken into the activation once for all outputs. Sums are float32;
a scale is applied once per word.

Tests count instructions in the machine code for sm_90 (three a weight, and no shared memory but the
pipeline's); block sizes are the fastest of those tried on an H200 with the layers of Qwen-1.8B and
Qwen-7B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.runtime.kernels.triton_support import multiprocessors, power_of_2

EXPONENT = 0x4B000000
"""Of 2^23, whose last mantissa bit is worth 1. An argument of the kernel: an instruction holds one constant,
and that is the mask."""
_NARROW, _WIDE = (128, 16, 8), (64, 32, 4)
"""Words and outputs of a block, and warps; wide where outputs are many. Fewer words than threads, so that
each thread loads the activations that it needs by itself; more would be handed around through shared memory,
with a barrier for each field."""


@triton.jit
def _gemv(
    x: tl.tensor, words: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, y: tl.tensor,
    outputs: tl.tensor, exponent: tl.tensor,
    WORDS: tl.constexpr, GROUP_WORDS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, BLOCK_OUT: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute BLOCK_OUT outputs over the words of one split; writes [split, output]."""
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    PER_WORD: tl.constexpr = 32 // BITS
    # Fields above bit 22 would reach into the exponent: the upper ones are taken from a shifted word.
    LOW: tl.constexpr = 5 if BITS == 4 else 2
    MASK: tl.constexpr = (1 << BITS) - 1
    sums = tl.zeros([BLOCK_WORDS, BLOCK_OUT], tl.float32)
    for step in tl.range(0, STEPS, num_stages=3):
        word = (split * STEPS + step) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        here = word < WORDS
        read = here[:, None] & (out < outputs)[None, :]
        low = tl.load(words + word[:, None] * outputs + out[None, :], read, 0)
        high = low >> (LOW * BITS)
        place = (word // GROUP_WORDS)[:, None] * outputs + out[None, :]
        scale = tl.load(scales + place, read, 0.0).to(tl.float32)
        if not SYMMETRIC:
            zero = tl.load(zeros + place, read, 0).to(tl.float32)
        part = tl.zeros([BLOCK_WORDS, BLOCK_OUT], tl.float32)
        for field in tl.static_range(PER_WORD):
            source = low if field < LOW else high
            number = ((source & (MASK << ((field % LOW) * BITS))) | exponent).to(tl.float32, bitcast=True)
            if SYMMETRIC:
                number = number - (8388608.0 + (1 << (BITS - 1)) * (1 << ((field % LOW) * BITS)))
            else:
                number = number - (8388608.0 + zero * (1 << ((field % LOW) * BITS)))
            activation = tl.load(x + word * PER_WORD + field, here, 0.0).to(tl.float32)
            part += number * (activation * (1.0 / (1 << ((field % LOW) * BITS))))[:, None]
        sums += part * scale
    total = tl.sum(sums, axis=0)
    if BIAS:  # once: in the first of the parts that are added up
        total += tl.load(bias + out, (out < outputs) & (split == 0), 0.0).to(tl.float32)
    tl.store(y + split * outputs + out, total.to(y.dtype.element_ty), out < outputs)


def multiply_row(
    row: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, bias: Tensor | None = None
) -> Tensor:
    """Return ``row @ weight + bias`` over packed words.

    Args:
        row: [1, in], float16, bfloat16 or float32.
        words: int32 [in · bits / 32, out], 32 / bits consecutive inputs each, the first in the lowest bits.
        scales: [groups, out], of any float dtype and either sign.
        zeros: uint8 [groups, out]; None: the middle everywhere.
        bits: 4 or 8.
        bias: [out], of any float dtype, or None.

    Returns:
        [1, out] in the dtype of the row.
    """
    outputs = words.shape[1]
    row = row if row.stride(-1) == 1 else row.contiguous()
    block, width, warps, steps, splits = plan_row(words.shape[0], outputs, multiprocessors(row.device))
    dtype = row.dtype if splits == 1 else torch.float32
    y = torch.empty((splits, outputs), dtype=dtype, device=row.device)
    with torch.cuda.device_of(row):
        _gemv[(triton.cdiv(outputs, width), splits)](
            row, words, scales, words if zeros is None else zeros, words if bias is None else bias, y,
            outputs, EXPONENT,
            WORDS=words.shape[0], GROUP_WORDS=words.shape[0] // scales.shape[0], BITS=bits,
            SYMMETRIC=zeros is None, BIAS=bias is not None,
            BLOCK_WORDS=block, BLOCK_OUT=width, STEPS=steps, num_warps=warps,
        )  # fmt: skip
    # The parts are added in their order in a second pass: no atomics, the same bits each time.
    return y if splits == 1 else y.sum(0, keepdim=True).to(row.dtype)


def plan_row(words: int, outputs: int, processors: int) -> tuple[int, int, int, int, int]:
    """Return words, outputs and warps of a block, steps, splits of the inputs: no processor is to be idle."""
    most, width, warps = _WIDE if outputs >= 2 * _WIDE[1] * processors else _NARROW
    block = min(most, power_of_2(words))
    blocks = -(-words // block)
    splits, programs = 1, -(-outputs // width)
    while programs * splits * 2 <= processors and splits * 2 <= min(blocks, 8):
        splits *= 2
    return block, width, warps, -(-blocks // splits), splits
