"""Sixteen float32 at a time: what code for the CPU needs beside products."""

from __future__ import annotations

import math
import struct

from llvmlite import ir

from qwenq.native.code import FLOAT, LANES, SHORT, WORD, Code, same, vector

FLOATS = vector(FLOAT)
# e^r = Σ r^i / i! for |r| ≤ ln 2 / 2: the first term that is left out is below 2e-8 of the sum.
_EXP_TERMS = 8
_LN2 = 0.693359375, -2.12194440e-4  # in two parts, the first exact in few bits (Cody and Waite)
_EXP_RANGE = -87.0, 88.0  # where e^x is a normal float32
_AS_SET = 4  # rounds as the CPU is set to: what intrinsics for AVX-512 want to be told


def float_bits(number: float) -> int:
    """A float32 as the integer that has its bits: as compiled code is told one, see ``told_float``."""
    return int.from_bytes(struct.pack("<f", number), "little")


def told_float(code: Code, bits: ir.Value) -> ir.Value:
    """The float32 whose bits are in a 64-bit integer."""
    return code.bitcast(code.trunc(bits, WORD), FLOAT)


def floats(code: Code, base: ir.Value, offset: ir.Value | int) -> ir.Value:
    """16 numbers from ``offset`` numbers behind an address."""
    return code.read(base, offset, FLOATS, FLOAT)


def put_floats(code: Code, value: ir.Value, base: ir.Value, offset: ir.Value | int) -> None:
    """Store them there."""
    code.write(value, base, offset, FLOAT)


def multiply_add(code: Code, first: ir.Value, second: ir.Value, third: ir.Value) -> ir.Value:
    """``first · second + third``, rounded once."""
    return code.run("llvm.fma.v16f32", FLOATS, first, second, third)


def exponential(code: Code, x: ir.Value) -> ir.Value:
    """e^x to the precision of float32; what lies outside the range of normal numbers becomes its end."""
    low, high = (same(FLOAT, end) for end in _EXP_RANGE)
    # The CPU's own maximum and minimum are their second operand where either is no number: x stays none.
    x = _extreme(code, "max", low, _extreme(code, "min", high, x))
    power = code.run("llvm.rint.v16f32", FLOATS, code.fmul(x, same(FLOAT, 1 / math.log(2))))
    rest = x
    for part in _LN2:
        rest = multiply_add(code, power, same(FLOAT, -part), rest)
    total = same(FLOAT, 1 / math.factorial(_EXP_TERMS - 1))
    for term in range(_EXP_TERMS - 2, -1, -1):
        total = multiply_add(code, total, rest, same(FLOAT, 1 / math.factorial(term)))
    all_lanes, rounding = ir.Constant(SHORT, -1), WORD(_AS_SET)
    return code.run("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, total, power, total, all_lanes, rounding)


def _extreme(code: Code, which: str, first: ir.Value, second: ir.Value) -> ir.Value:
    """The ``max`` or ``min`` of 16 numbers each, as the CPU's instruction has it."""
    return code.run(f"llvm.x86.avx512.{which}.ps.512", FLOATS, first, second, WORD(_AS_SET))


def larger(code: Code, first: ir.Value, second: ir.Value) -> ir.Value:
    """The larger of 16 numbers each, in one instruction; ``second`` where either is none."""
    return _extreme(code, "max", first, second)


def sigmoid(code: Code, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x)."""
    return code.fdiv(same(FLOAT, 1.0), code.fadd(same(FLOAT, 1.0), exponential(code, code.fneg(x))))


def lanes_before(code: Code, count: ir.Value, value: ir.Value, otherwise: float) -> ir.Value:
    """The first ``count`` lanes (64-bit integer) of a value, another number in the rest."""
    index = ir.Constant(vector(WORD), list(range(LANES)))
    inside = code.icmp_signed("<", index, code.spread(code.trunc(count, WORD)))
    return code.select(inside, value, same(FLOAT, otherwise))
