"""One to four rows times packed integers: bound by memory, so with few instructions for each weight.

A field of b bits at bit s of a word becomes a float32 by one operation: masked and put below the exponent
of 2^23 it reads 2^23 + q · 2^s, exactly. One subtraction leaves (q - zero) · 2^s, and 2^-s is multiplied
into the activation once for all outputs. Sums are float32; the scale is applied once per word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.runtime.kernels.triton_support import multiprocessors, power_of_2

_EXPONENT = tl.constexpr(0x4B000000)  # 2^23: its last mantissa bit is worth 1
_OUTPUTS = 16  # of one program: 64 bytes of each row of words, so that a layer of 2048 outputs fills a GPU


@triton.jit
def _gemv(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    x_row: tl.tensor,
    WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """BLOCK_OUT outputs over the words of one split; writes float32 [split, row, output]."""
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, ROWS)
    PER_WORD: tl.constexpr = 32 // BITS
    # Fields above bit 22 would reach into the exponent: the upper ones are taken from a shifted word.
    LOW: tl.constexpr = 5 if BITS == 4 else 2
    MASK: tl.constexpr = (1 << BITS) - 1
    sums = tl.zeros([ROWS, BLOCK_WORDS, BLOCK_OUT], tl.float32)
    for step in range(STEPS):
        word = (split * STEPS + step) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        here = word < WORDS
        read = here[:, None] & (out < outputs)[None, :]
        low = tl.load(words + word[:, None] * outputs + out[None, :], read, 0)
        high = low >> (LOW * BITS)
        place = (word // GROUP_WORDS)[:, None] * outputs + out[None, :]
        scale = tl.load(scales + place, read, 0.0).to(tl.float32)
        if not SYMMETRIC:
            zero = tl.load(zeros + place, read, 0).to(tl.float32)
        part = tl.zeros([ROWS, BLOCK_WORDS, BLOCK_OUT], tl.float32)
        for field in tl.static_range(PER_WORD):
            SHIFT: tl.constexpr = (field if field < LOW else field - LOW) * BITS
            source = low if field < LOW else high
            number = ((source & (MASK << SHIFT)) | _EXPONENT).to(tl.float32, bitcast=True)
            if SYMMETRIC:
                number = number - (8388608.0 + (1 << (BITS - 1)) * (1 << SHIFT))
            else:
                number = number - (8388608.0 + zero * (1 << SHIFT))
            given = (row < rows)[:, None] & here[None, :]
            activation = tl.load(x + row[:, None] * x_row + word[None, :] * PER_WORD + field, given, 0.0)
            activation = activation.to(tl.float32) * (1.0 / (1 << SHIFT))
            part += number[None, :, :] * activation[:, :, None]
        sums += part * scale[None, :, :]
    result = tl.sum(sums, axis=1)  # [ROWS, BLOCK_OUT]
    place = y + (split * rows + row[:, None]) * outputs + out[None, :]
    tl.store(place, result.to(y.dtype.element_ty), (row < rows)[:, None] & (out < outputs)[None, :])


def multiply(rows: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """``rows @ weight`` over packed words.

    Args:
        rows: [1 … 4, in], float16, bfloat16 or float32.
        words: int32 [in · bits / 32, out], 32 / bits consecutive inputs each, the first in the lowest bits.
        scales: [groups, out], of any float dtype and either sign.
        zeros: uint8 [groups, out]; None: the middle everywhere.
        bits: 4 or 8.

    Returns:
        [rows, out] in the dtype of the rows.
    """
    count, outputs = len(rows), words.shape[1]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    height = power_of_2(count)
    block, steps, splits, warps = plan(words.shape[0], outputs, height, multiprocessors(rows.device))
    dtype = rows.dtype if splits == 1 else torch.float32
    y = torch.empty((splits, count, outputs), dtype=dtype, device=rows.device)
    _gemv[(triton.cdiv(outputs, _OUTPUTS), splits)](
        rows,
        words,
        scales,
        words if zeros is None else zeros,
        y,
        count,
        outputs,
        rows.stride(0),
        WORDS=words.shape[0],
        GROUP_WORDS=words.shape[0] // scales.shape[0],
        BITS=bits,
        SYMMETRIC=zeros is None,
        ROWS=height,
        BLOCK_WORDS=block,
        BLOCK_OUT=_OUTPUTS,
        STEPS=steps,
        num_warps=warps,
    )
    # The parts are added in their order by a pass of its own: no atomics, the same bits each time.
    return y[0] if splits == 1 else y.sum(0).to(rows.dtype)


def plan(words: int, outputs: int, rows: int, processors: int) -> tuple[int, int, int, int]:
    """Words of a block, steps of the loop, splits of the inputs, warps: every processor is to have loads.

    Chosen by arithmetic, for about 16 KB of words on their way per processor; not by measurement.
    """
    programs = -(-outputs // _OUTPUTS)
    warps = 4 if programs >= 4 * processors else 8
    block = min(32 * warps // rows, power_of_2(words))
    blocks = -(-words // block)
    splits = 1
    while programs * splits * 2 <= processors and splits * 2 <= min(blocks, 8):
        splits *= 2
    return block, -(-blocks // splits), splits, warps
