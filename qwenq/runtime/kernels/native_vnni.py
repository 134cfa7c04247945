"""Products of 4- and 8-bit weights with activations in 16 bits, as code for CPUs with AVX-512 VNNI.

VNNI's instruction multiplies 64 bytes with 64 signed bytes and adds each four products to one of 16 sums
of 32 bits: exact. A block is 32 outputs, two registers of 16; a register of weights holds 4 columns of 16
outputs (8 bits) or 8 columns, the first four in the low nibbles (4 bits). An activation is two signed
bytes, 256 · high + low, so a register of weights is unpacked once and multiplied twice: reading it takes
longer than that. Each group of columns is scaled when its sum is complete, in float32:

    y[n] = Σ_g  s_w[g, n] · s_x[g] · ( Σ_k q_w[k, n] · q_x[k]  -  middle · Σ_k q_x[k] )

with the activations of each group as 32512 steps to their largest, rounded to the nearest: finer than
bfloat16 wherever they are above a hundredth of it. What is not finite stays so: its group's scale is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir

from qwenq.native.bfloat16 import put_bfloat16, read_bfloat16
from qwenq.native.code import (
    BYTE,
    FLOAT,
    HALF,
    LANES,
    LONG,
    NOTHING,
    POINTER,
    SHORT,
    WORD,
    Code,
    compiled,
    on_all_threads,
    same,
    vector,
)
from qwenq.native.floats import FLOATS
from qwenq.runtime.kernels.native_layout import LAYER, OUTPUTS

_REGISTERS = OUTPUTS // LANES
_LARGEST = 127.0 * 256.0  # the largest of a group in 16 bits: its high byte is 127
_TINY = 1e-30  # instead of zero as the largest of a group
_ARGUMENTS = 5
Sums = list[list[ir.Value]]
"""A variable for each row and register of outputs."""

Put = Callable[[Code, ir.Value, ir.Value, ir.Value], None]
"""(code, 16 sums, base, offset): puts them where outputs go."""


@dataclass(frozen=True)
class Activations:
    """Rows in 16 bits: all high bytes, all low ones, then a scale and then a sum for each group.

    Attributes:
        high, low: addresses of the bytes.
        columns, group_size: of a row.
        groups: of a row.
        scales, sums: addresses.
    """

    high: ir.Value
    low: ir.Value
    columns: ir.Value
    group_size: ir.Value
    groups: ir.Value
    scales: ir.Value
    sums: ir.Value

    @classmethod
    def at(
        cls, code: Code, place: ir.Value, rows: ir.Value, columns: ir.Value, group_size: ir.Value
    ) -> Activations:
        """So many rows that begin at an address."""
        groups = code.sdiv(columns, group_size)
        low = code.behind(place, code.times(rows, columns), BYTE)
        scales = code.behind(low, code.times(rows, columns), BYTE)
        sums = code.behind(scales, code.times(rows, groups), FLOAT)
        return cls(place, low, columns, group_size, groups, scales, sums)


def product(bits: int, rows: int, scales: str) -> Any:
    """A function ``(layer, x, y, workspace, chunks, threads)``: so many chunks of ``rows`` rows.

    All are 64-bit integers: the address of LAYER, of bfloat16 [chunks · rows, columns], of
    bfloat16 [chunks · rows, outputs], and of `activation_bytes`.

    Args:
        bits: of the weights as stored, 4 or 8.
        rows: whose sums are kept in registers while weights are read.
        scales: ``float16`` or ``float32``, of the weights.
    """
    module = ir.Module()
    multiply(module, "multiply", bits, rows, scales, put_bfloat16)
    code = Code(module, "thread", POINTER)
    (job,) = code.function.args
    layer, x, y, workspace = (code.read(job, place, POINTER, LONG) for place in range(4))
    chunks = code.read(job, 4, LONG, LONG)
    columns, group_size = (code.read(layer, LAYER.index(name), LONG, LONG) for name in LAYER[2::2])
    all_rows = code.times(chunks, rows)
    held = Activations.at(code, workspace, all_rows, columns, group_size)
    with code.each(0, all_rows) as row:
        quantise(
            code, held, row, partial(read_bfloat16, code, code.behind(x, code.times(row, columns), SHORT))
        )
    code.wait()
    code.run("multiply", NOTHING, layer, y, workspace, chunks)
    code.ret_void()
    on_all_threads(module, "all_threads", "thread", _ARGUMENTS)
    return compiled(module, "all_threads", _ARGUMENTS + 1)


def unpacked(bits: int, scales: str) -> Any:
    """A function ``(layer, weight, threads)`` that writes bfloat16 [columns, outputs]: the integers, scaled.

    Args:
        bits, scales: as in `product`.
    """
    module = ir.Module()
    code = Code(module, "thread", POINTER)
    (job,) = code.function.args
    layer, weight = (code.read(job, place, POINTER, LONG) for place in range(2))
    words, kind = vector(WORD), vector(HALF if scales == "float16" else FLOAT)
    weights, weight_scales = (code.read(layer, place, POINTER, LONG) for place in range(2))
    columns, blocks, group_size = (code.read(layer, place, LONG, LONG) for place in range(2, 5))
    groups, steps = code.sdiv(columns, group_size), code.sdiv(columns, LONG(32 // bits))
    with code.each(*code.share(blocks)) as block, code.each(0, steps) as step:
        column = code.times(step, 32 // bits)
        group = code.plus(code.times(block, groups), code.sdiv(column, group_size))
        for register in range(_REGISTERS):
            place = code.plus(code.times(code.plus(code.times(block, steps), step), _REGISTERS), register)
            held = code.read(weights, place, words, words)
            scale = code.read(weight_scales, code.plus(code.times(group, _REGISTERS), register), kind, kind)
            scale = scale if scales == "float32" else code.fpext(scale, FLOATS)
            for number, four in enumerate(fours(code, held, bits)):
                for byte in range(4):
                    one = code.and_(code.lshr(four, same(WORD, 8 * byte)), same(WORD, 255))
                    value = code.sitofp(code.sub(one, same(WORD, 2 ** (bits - 1))), FLOATS)
                    at = code.times(code.plus(column, 4 * number + byte), code.times(blocks, OUTPUTS))
                    at = code.plus(at, code.times(block, OUTPUTS), register * LANES)
                    put_bfloat16(code, code.fmul(value, scale), weight, at)
    code.ret_void()
    on_all_threads(module, "all_threads", "thread", 2)
    return compiled(module, "all_threads", 3)


def quantise(code: Code, held: Activations, row: ir.Value, read: Callable[[ir.Value], ir.Value]) -> None:
    """A row in 16 bits: this thread's share of its groups. ``read(column)`` gives 16 numbers in float32."""
    with code.each(*code.share(held.groups)) as group:
        start = code.times(group, held.group_size)
        stop = code.add(start, held.group_size)
        largest = code.local(same(FLOAT, 0.0))
        with code.each(start, stop, LANES) as column:
            size = code.run("llvm.fabs.v16f32", FLOATS, read(column))
            code.update(largest, FLOATS, partial(code.run, "llvm.maximum.v16f32", FLOATS), size)
        top = code.run("llvm.vector.reduce.fmaximum.v16f32", FLOAT, code.load(largest, typ=FLOATS))
        top = code.run("llvm.maximum.f32", FLOAT, top, FLOAT(_TINY))
        place = code.plus(code.times(row, held.groups), group)
        code.write(code.fdiv(top, FLOAT(_LARGEST)), held.scales, place, FLOAT)
        steps = code.spread(code.fdiv(FLOAT(_LARGEST), top))
        total = code.local(same(WORD, 0))
        with code.each(start, stop, LANES) as column:
            whole = code.run("llvm.rint.v16f32", FLOATS, code.fmul(read(column), steps))
            number = code.run("llvm.fptosi.sat.v16i32.v16f32", vector(WORD), whole)
            high = code.ashr(code.add(number, same(WORD, 128)), same(WORD, 8))
            low = code.sub(number, code.shl(high, same(WORD, 8)))
            to = code.plus(code.times(row, held.columns), column)
            for part, place_of in ((high, held.high), (low, held.low)):
                code.write(code.trunc(part, vector(BYTE)), place_of, to, BYTE)
            code.update(total, vector(WORD), code.add, number)
        lanes = code.load(total, typ=vector(WORD))
        code.write(code.run("llvm.vector.reduce.add.v16i32", WORD, lanes), held.sums, place, WORD)


def fours(code: Code, held: ir.Value, bits: int) -> list[ir.Value]:
    """A register of weights as registers that hold a byte for each of four columns."""
    if bits == 8:
        return [held]
    low = same(WORD, 0x0F0F0F0F)
    return [code.and_(held, low), code.and_(code.lshr(held, same(WORD, 4)), low)]


def multiply(module: ir.Module, name: str, bits: int, rows: int, scales: str, put: Put) -> None:
    """Add a function ``(layer, y, activations, chunks)``: this thread's share of the blocks, for all rows."""
    code = Code(module, name, POINTER, POINTER, POINTER, LONG)
    _Multiply(code, bits, rows, HALF if scales == "float16" else FLOAT, put).build()


class _Multiply:
    """Builds the loops of ``multiply``; a block of weights stays in the cache while all rows pass."""

    def __init__(self, code: Code, bits: int, rows: int, scale_type: ir.Type, put: Put) -> None:
        self.code, self.bits, self.rows, self.scale_type, self.put = code, bits, rows, scale_type, put
        layer, self.y, activations, self.chunks = code.function.args
        self.weights, self.scales = (code.read(layer, place, POINTER, LONG) for place in range(2))
        columns, self.blocks, group_size = (code.read(layer, place, LONG, LONG) for place in range(2, 5))
        self.x = Activations.at(code, activations, code.times(self.chunks, rows), columns, group_size)
        self.at_once = 32 // bits  # columns in a register of weights
        self.steps = code.sdiv(group_size, LONG(self.at_once))

    def build(self) -> None:
        """The loops."""
        code, groups = self.code, self.x.groups
        with code.each(*code.share(self.blocks)) as block, code.each(0, self.chunks) as chunk:
            rows = [code.plus(code.times(chunk, self.rows), row) for row in range(self.rows)]
            totals = self._locals(FLOAT)
            with code.each(0, groups) as group:
                at = code.plus(code.times(block, groups), group)
                places = [code.plus(code.times(row, groups), group) for row in rows]
                dots = self._locals(WORD), self._locals(WORD)
                with code.each(0, self.steps) as step:
                    column = code.times(code.plus(code.times(group, self.steps), step), self.at_once)
                    starts = [code.plus(code.times(row, self.x.columns), column) for row in rows]
                    self._step(code.plus(code.times(at, self.steps), step), starts, dots)
                self._scale(at, places, dots, totals)
            for row, sums in zip(rows, totals, strict=True):
                start = code.times(code.plus(code.times(row, self.blocks), block), OUTPUTS)
                for register, total in enumerate(sums):
                    self.put(code, code.load(total, typ=FLOATS), self.y, code.plus(start, register * LANES))
        code.ret_void()

    def _locals(self, kind: ir.Type) -> Sums:
        """A sum for each row and register of outputs."""
        return [[self.code.local(same(kind, 0)) for _ in range(_REGISTERS)] for _ in range(self.rows)]

    def _step(self, at: ir.Value, starts: list[ir.Value], dots: tuple[Sums, Sums]) -> None:
        """One register of weights for each 16 outputs, with the columns of all rows."""
        code, words = self.code, vector(WORD)
        for register in range(_REGISTERS):
            held = code.read(self.weights, code.plus(code.times(at, _REGISTERS), register), words, words)
            for part, four in enumerate(fours(code, held, self.bits)):
                for row, start in enumerate(starts):
                    for sums, place in zip(dots, (self.x.high, self.x.low), strict=True):
                        numbers = code.spread(code.read(place, code.plus(start, 4 * part), WORD, BYTE))
                        code.update(sums[row][register], words, self._add_products, four, numbers)

    def _add_products(self, dot: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """VNNI's instruction."""
        code, quads = self.code, vector(BYTE, 4 * LANES)
        both = code.bitcast(unsigned, quads), code.bitcast(signed, quads)
        return code.run("llvm.x86.avx512.vpdpbusd.512", dot.type, dot, *both)

    def _scale(self, at: ir.Value, places: list[ir.Value], dots: tuple[Sums, Sums], totals: Sums) -> None:
        """Add a group's exact sums, scaled, to the outputs."""
        code, kind, middle = self.code, vector(self.scale_type), WORD(2 ** (self.bits - 1))
        for register in range(_REGISTERS):
            scale = code.read(self.scales, code.plus(code.times(at, _REGISTERS), register), kind, kind)
            if self.scale_type is HALF:
                scale = code.fpext(scale, FLOATS)
            for row, of_row in enumerate(places):
                high, low = (code.load(sums[row][register], typ=vector(WORD)) for sums in dots)
                taken = code.spread(code.mul(code.read(self.x.sums, of_row, WORD, WORD), middle))
                dot = code.sub(code.add(code.shl(high, same(WORD, 8)), low), taken)
                both = code.fmul(scale, code.spread(code.read(self.x.scales, of_row, FLOAT, FLOAT)))
                code.update(totals[row][register], FLOATS, self._multiply_add, code.sitofp(dot, FLOATS), both)

    def _multiply_add(self, total: ir.Value, dot: ir.Value, scale: ir.Value) -> ir.Value:
        return self.code.run("llvm.fma.v16f32", total.type, dot, scale, total)
