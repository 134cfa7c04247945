"""Bfloat16 in compiled code: conversions, and the instruction that adds products of pairs (AVX-512 BF16).

It multiplies two registers of 32 bfloat16 and adds each two neighbours' products to one of 16 float32 sums.
What it sums over therefore lies in pairs: two numbers in 32 bits, the first in the lower half.
"""

from __future__ import annotations

from llvmlite import ir

from qwenq.native.code import FLOAT, LANES, SHORT, WORD, Code, same, vector
from qwenq.native.floats import FLOATS

WORDS, SHORTS = vector(WORD), vector(SHORT)


class _BFloat16(ir.types.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_PAIRS = ir.VectorType(_BFloat16(), 2 * LANES)
_NUMBERS = ir.VectorType(_BFloat16(), LANES)


def add_pairs(code: Code, sums: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
    """16 float32 sums, and the products of 16 pairs each in two registers of 32-bit words."""
    pairs = (code.bitcast(words, _PAIRS) for words in (first, second))
    return code.run("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, sums, *pairs)


def rows_as_pairs(code: Code, base: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
    """16 words: numbers of one row beside those of another; offsets count bfloat16."""
    low, high = (code.zext(code.read(base, row, SHORTS, SHORT), WORDS) for row in (first, second))
    return code.or_(low, code.shl(high, same(WORD, 16)))


def read_bfloat16(code: Code, row: ir.Value, column: ir.Value | int, lanes: int = LANES) -> ir.Value:
    """So many bfloat16 as float32."""
    shorts = code.read(row, column, vector(SHORT, lanes), SHORT)
    halves = code.zext(shorts, vector(WORD, lanes))
    return code.bitcast(code.shl(halves, same(WORD, 16, lanes)), vector(FLOAT, lanes))


def round_to_bfloat16(code: Code, value: ir.Value) -> ir.Value:
    """Float32 that bfloat16 holds; see ``put_bfloat16``."""
    lanes = value.type.count
    bits = code.and_(_rounded_bits(code, value), same(WORD, -0x10000, lanes))
    return code.bitcast(bits, vector(FLOAT, lanes))


def put_bfloat16(code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
    """Rounded to the nearest, of two the even one; infinities stay.

    What is no number stays none where its lower 16 bits are zero. So they are in what the CPU makes of an
    invalid operation, and in what comes of bfloat16. Others, which only a file of float16 or float32 could
    hold, may become an infinity or a zero: weights are checked where they are read (``models.integrity``).
    """
    lanes = value.type.count
    upper = code.lshr(_rounded_bits(code, value), same(WORD, 16, lanes))
    code.write(code.trunc(upper, vector(SHORT, lanes)), base, offset, SHORT)


def _rounded_bits(code: Code, value: ir.Value) -> ir.Value:
    """Words whose upper half is the bfloat16."""
    lanes = value.type.count
    bits = code.bitcast(value, vector(WORD, lanes))
    odd = code.and_(code.lshr(bits, same(WORD, 16, lanes)), same(WORD, 1, lanes))
    return code.add(bits, code.add(odd, same(WORD, 0x7FFF, lanes)))


def put_normal_bfloat16(code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
    """The same in one instruction (AVX-512 BF16), which takes numbers too small to be normal for zero."""
    rounded = code.run("llvm.x86.avx512bf16.cvtneps2bf16.512", _NUMBERS, value)
    code.write(code.bitcast(rounded, SHORTS), base, offset, SHORT)
