"""Multiply by packed integers: one row, a few rows by tensor cores, many rows by an unpacked weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.compute.gpu import multiprocessors
from qwenq.compute.triton.support import product

# Multiply one row by packed integers, as a decode step does: few instructions a weight, at memory's speed.
#
# A field of b bits at bit s of a word becomes a float32 by one operation: masked and put below the
# exponent of 2^23 it reads 2^23 + q · 2^s, exactly. One subtraction leaves (q - zero) · 2^s, one
# multiply-add does the rest, with 2^-s taken into the activation once for all outputs. Sums are float32;
# a scale is applied once per word.
#
# Tests count instructions in the machine code for sm_90 (three a weight, and no shared memory but the
# pipeline's); block sizes are the fastest of those tried on an H200 with the layers of Qwen-1.8B and
# Qwen-7B.


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
    block = min(most, triton.next_power_of_2(words))
    blocks = -(-words // block)
    splits, programs = 1, -(-outputs // width)
    while programs * splits * 2 <= processors and splits * 2 <= min(blocks, 8):
        splits *= 2
    return block, width, warps, -(-blocks // splits), splits


# Multiply two to sixteen rows by packed integers: tensor cores, over words that are unpacked on their way.
#
# Integers less their zero point are exact in bfloat16 and float16 (they are at most 255 in size), so each
# group is summed in float32 and scaled there: no weight is rounded.


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


# Unpack integers to plain weights on the GPU, for products of many rows by cuBLAS.


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
