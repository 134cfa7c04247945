"""Multiply two to sixteen rows by packed integers: tensor cores, over words that are unpacked on their way.

Integers less their zero point are exact in bfloat16 and float16 (they are at most 255 in size), so each
group is summed in float32 and scaled there: no weight is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.runtime.kernels.triton_gptq_gemv import EXPONENT
from qwenq.runtime.kernels.triton_math import product
from qwenq.runtime.kernels.triton_support import multiprocessors

_DOT_OUTPUTS = 64
_LEAST = 16  # the shortest inner dimension of a tensor-core product


@triton.jit
def _dot(
    x: tl.tensor, words: tl.tensor, scales: tl.tensor, zeros: tl.tensor, y: tl.tensor,
    rows: tl.tensor, outputs: tl.tensor,
    x_row: tl.tensor,
    exponent: tl.tensor,
    WORDS: tl.constexpr, GROUP_WORDS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_WORDS: tl.constexpr, REPEAT: tl.constexpr, BLOCK_OUT: tl.constexpr, STEPS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute BLOCK_OUT outputs over the words of one split; writes float32 [split, row, output].

    A product is over BLOCK_WORDS · REPEAT inputs: of each word REPEAT neighbouring fields, because the
    words of a short group are fewer than tensor cores want.
    """
    split = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, 16)
    inner = tl.arange(0, BLOCK_WORDS * REPEAT)
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    sums = tl.zeros([16, BLOCK_OUT], tl.float32)
    for step in range(STEPS):
        first = (split * STEPS + step) * BLOCK_WORDS
        word = first + inner // REPEAT
        here = word < WORDS
        read = here[:, None] & (out < outputs)[None, :]
        packed = tl.load(words + word[:, None] * outputs + out[None, :], read, 0)
        place = (first // GROUP_WORDS) * outputs + out
        real = (out < outputs) & (first < WORDS)
        scale = tl.load(scales + place, real, 0.0).to(tl.float32)
        if SYMMETRIC:
            offset = tl.full([BLOCK_OUT], 8388608.0 + (1 << (BITS - 1)), tl.float32)
        else:
            offset = 8388608.0 + tl.load(zeros + place, real, 0).to(tl.float32)
        part = tl.zeros([16, BLOCK_OUT], tl.float32)
        for turn in tl.static_range(PER_WORD // REPEAT):
            field = turn * REPEAT + inner % REPEAT
            # A field below the exponent of 2^23 reads 2^23 + q, see ``_gemv``; a conversion is slower.
            number = ((packed >> (field * BITS)[:, None]) & MASK) | exponent
            number = number.to(tl.float32, bitcast=True) - offset[None, :]
            given = (row < rows)[:, None] & here[None, :]
            activation = tl.load(x + row[:, None] * x_row + (word * PER_WORD + field)[None, :], given, 0.0)
            part += product(activation, number.to(activation.dtype))
        sums += part * scale[None, :]
    place = y + (split * rows + row[:, None]) * outputs + out[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), (row < rows)[:, None] & (out < outputs)[None, :])


def multiply_rows(rows: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Return ``rows @ weight`` over packed words.

    Args:
        rows: [1 … 16, in], float16 or bfloat16.
        words, scales, zeros, bits: see ``multiply_row``; groups of a multiple of 32 inputs.

    Returns:
        [rows, out] in the dtype of the rows.
    """
    count, outputs = len(rows), words.shape[1]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    group_words = words.shape[0] // scales.shape[0]
    block, repeat, steps, splits = plan_rows(
        words.shape[0], group_words, outputs, multiprocessors(rows.device)
    )
    dtype = rows.dtype if splits == 1 else torch.float32
    y = torch.empty((splits, count, outputs), dtype=dtype, device=rows.device)
    with torch.cuda.device_of(rows):
        _dot[(triton.cdiv(outputs, _DOT_OUTPUTS), splits)](
            rows, words, scales, words if zeros is None else zeros, y,
            count, outputs, rows.stride(0), EXPONENT,
            WORDS=words.shape[0], GROUP_WORDS=group_words, BITS=bits, SYMMETRIC=zeros is None,
            BLOCK_WORDS=block, REPEAT=repeat, BLOCK_OUT=_DOT_OUTPUTS, STEPS=steps, num_warps=4, num_stages=3,
        )  # fmt: skip
    # The parts are added in their order in a second pass: no atomics, the same bits each time.
    return y[0] if splits == 1 else y.sum(0).to(rows.dtype)


def plan_rows(words: int, group_words: int, outputs: int, processors: int) -> tuple[int, int, int, int]:
    """Return words of a block, fields taken of each at once, steps, splits. A block lies in one group.

    Chosen by arithmetic, for about two programs a processor; not by measurement.
    """
    block = next(size for size in (32, 16, 8, 4) if group_words % size == 0)
    repeat = max(1, _LEAST // block)
    blocks = words // block
    splits, programs = 1, -(-outputs // _DOT_OUTPUTS)
    while programs * splits < 2 * processors and splits * 2 <= min(blocks, 16):
        splits *= 2
    return block, repeat, -(-blocks // splits), splits
