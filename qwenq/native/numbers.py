"""Activations as compiled code holds them: words of 32 bits, of two bfloat16 or of one float32.

Products are summed in float32 in either case. What is written for words serves both: a word of one operand
times a word of the other is two products for bfloat16 (``bfloat16.add_pairs``), one for float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from llvmlite import ir

from qwenq.native.bfloat16 import (
    WORDS,
    add_pairs,
    put_bfloat16,
    put_normal_bfloat16,
    read_bfloat16,
    round_to_bfloat16,
    rows_as_pairs,
)
from qwenq.native.code import FLOAT, LANES, SHORT, WORD, Code, same, vector
from qwenq.native.floats import FLOATS, multiply_add, put_floats


class Numbers(Protocol):
    """One dtype of activations.

    Attributes:
        per_word: so many share a word.
        unit: what offsets count: the type of one number in memory.
        size: of one, in bytes.
    """

    per_word: int
    unit: ir.Type
    size: int

    def read(self, code: Code, base: ir.Value, offset: ir.Value | int, lanes: int = LANES) -> ir.Value:
        """So many numbers, as float32."""
        ...

    def put(self, code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
        """Store float32, rounded to the nearest."""
        ...

    def put_normal(self, code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
        """The same where what is too small to be a normal number may become zero."""
        ...

    def rounded(self, code: Code, value: ir.Value) -> ir.Value:
        """Float32 as ``put`` and ``read`` would give them back."""
        ...

    def beside(self, code: Code, base: ir.Value, offsets: Sequence[ir.Value]) -> ir.Value:
        """16 words: numbers of ``per_word`` rows, which begin at these offsets, beside each other."""
        ...

    def add(self, code: Code, sums: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
        """16 float32 sums, and the products of two registers of words."""
        ...


class _BFloat16:
    per_word, unit, size = 2, SHORT, 2

    def read(self, code: Code, base: ir.Value, offset: ir.Value | int, lanes: int = LANES) -> ir.Value:
        return read_bfloat16(code, base, offset, lanes)

    def put(self, code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
        put_bfloat16(code, value, base, offset)

    def put_normal(self, code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
        put_normal_bfloat16(code, value, base, offset)

    def rounded(self, code: Code, value: ir.Value) -> ir.Value:
        return round_to_bfloat16(code, value)

    def beside(self, code: Code, base: ir.Value, offsets: Sequence[ir.Value]) -> ir.Value:
        return rows_as_pairs(code, base, *offsets)

    def add(self, code: Code, sums: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
        return add_pairs(code, sums, first, second)


class _Float32:
    per_word, unit, size = 1, FLOAT, 4

    def read(self, code: Code, base: ir.Value, offset: ir.Value | int, lanes: int = LANES) -> ir.Value:
        return code.read(base, offset, vector(FLOAT, lanes), FLOAT)

    def put(self, code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
        put_floats(code, value, base, offset)

    put_normal = put

    def rounded(self, code: Code, value: ir.Value) -> ir.Value:
        return value

    def beside(self, code: Code, base: ir.Value, offsets: Sequence[ir.Value]) -> ir.Value:
        (offset,) = offsets
        return code.read(base, offset, WORDS, WORD)

    def add(self, code: Code, sums: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
        return multiply_add(code, code.bitcast(first, FLOATS), code.bitcast(second, FLOATS), sums)


NUMBERS: dict[torch.dtype, Numbers] = {torch.bfloat16: _BFloat16(), torch.float32: _Float32()}
"""By dtype: those of ``support.FEATURES``."""


def tile_of_sums(code: Code, rows: int, registers: int) -> list[list[ir.Value]]:
    """Sums of a tile, zero so far: a variable of 16 float32 for each of its rows and registers."""
    return [[code.local(same(FLOAT, 0.0)) for _ in range(registers)] for _ in range(rows)]


def add_to_tile(
    code: Code,
    numbers: Numbers,
    sums: list[list[ir.Value]],
    words: Iterable[ir.Value],
    held: list[ir.Value],
) -> None:
    """Add the products of every row's word with every register's 16 words.

    Args:
        code: where.
        numbers: what the words hold.
        sums: of ``tile_of_sums``.
        words: one for each row. An iterator is asked for one when its row's turn comes, so that each is read
            just before it is used.
        held: registers of 16 words.
    """
    for of_row, word in zip(sums, words, strict=True):
        spread = code.spread(word)
        for place, other in zip(of_row, held, strict=True):
            code.store(numbers.add(code, code.load(place, typ=FLOATS), spread, other), place)
