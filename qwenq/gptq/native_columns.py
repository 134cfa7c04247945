"""The columns of a lazy block as code for CPUs with AVX-512: the same bits as torch's, see ``columns``.

A thread takes some rows through all columns of the block. What the columns before it have to push onto a
column is subtracted when its turn comes, in their order: the same differences as when each pushes at once,
but they stay in registers. Divisions wait for one another from column to column, so STRIPS registers of rows
go together.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.gptq.columns import FEWEST_ROWS, Block
from qwenq.native.code import (
    BYTE,
    FLOAT,
    LANES,
    LONG,
    POINTER,
    WORD,
    Code,
    compiled,
    on_all_threads,
    same,
    vector,
)
from qwenq.native.floats import FLOATS, float_bits, floats, put_floats, told_float

STRIPS = 4
"""Of 16 rows, that a thread takes at a time."""

_POINTERS = ("columns", "factors", "scales", "zeros", "groups", "integers", "errors", "costs", "rooms")
_TOLD = (*_POINTERS, "count", "rows", "levels")


def round_natively(block: Block) -> Tensor:
    """See ``columns.round_columns``; the columns stay as they were.

    Raises:
        ValueError: other shapes or dtypes than ``Block`` says, or fewer than 16 rows.
    """
    _require(block)
    count, rows = block.columns.shape
    threads = torch.get_num_threads()
    factors = block.U.T.contiguous()  # what is pushed onto a column lies in a row
    groups, costs = torch.tensor(block.groups), torch.empty(rows)
    rooms = torch.empty(threads, count * STRIPS * LANES)
    _code()(
        block.columns.data_ptr(), factors.data_ptr(), block.scales.data_ptr(), block.zeros.data_ptr(),
        groups.data_ptr(), block.integers.data_ptr(), block.errors.data_ptr(), costs.data_ptr(),
        rooms.data_ptr(), count, rows, float_bits(block.levels), threads,
    )  # fmt: skip
    return costs


def _require(block: Block) -> None:
    """Compiled code reads memory as it is told to: what it is told has to be true."""
    count, rows = block.columns.shape
    kinds = {"integers": torch.uint8}
    shapes = {"U": (count, count), "scales": block.scales.shape, "zeros": block.scales.shape}
    for name in ("columns", "U", "scales", "zeros", "integers", "errors"):
        x, kind, shape = getattr(block, name), kinds.get(name, torch.float32), shapes.get(name, (count, rows))
        if x.dtype != kind or x.device.type != "cpu" or x.shape != shape:
            raise ValueError(f"{name}: {x.dtype} {list(x.shape)} on {x.device}, not {kind} {list(shape)}")
        if name != "U" and not x.is_contiguous():
            raise ValueError(f"{name} do not lie in one piece")
    if block.scales.shape[1] != rows or rows < FEWEST_ROWS:
        raise ValueError(f"{rows} rows, and scales for {block.scales.shape[1]}")
    if len(block.groups) != count or min(block.groups) < 0 or max(block.groups) >= len(block.scales):
        raise ValueError(f"{count} columns in groups {block.groups} of {len(block.scales)}")


@cache
def _code() -> Any:
    """The function; its arguments are 64-bit integers, then the number of threads."""
    module = ir.Module()
    code = Code(module, "thread", POINTER)
    (job,) = code.function.args
    told = {
        name: code.read(job, place, POINTER if name in _POINTERS else LONG, LONG)
        for place, name in enumerate(_TOLD)
    }
    _build(code, told)
    code.ret_void()
    on_all_threads(module, "round", "thread", len(_TOLD))
    return compiled(module, "round", len(_TOLD) + 1)


def _build(code: Code, told: dict[str, ir.Value]) -> None:
    """This thread's rows. The last strips overlap where rows are no multiple: twice the same is written."""
    count, rows = told["count"], told["rows"]
    room = code.behind(told["rooms"], code.times(code.thread(), count, STRIPS), FLOATS)
    levels = code.spread(told_float(code, told["levels"]))
    last = code.sub(rows, LONG(LANES))
    units = code.sdiv(code.plus(rows, STRIPS * LANES - 1), LONG(STRIPS * LANES))
    with code.each(*code.share(units)) as unit:
        starts = [code.plus(code.times(unit, STRIPS * LANES), strip * LANES) for strip in range(STRIPS)]
        starts = [code.select(code.icmp_signed("<", start, last), start, last) for start in starts]
        costs = [code.local(same(FLOAT, 0.0)) for _ in starts]
        with code.each(0, count) as column:
            _build_column(code, told, column, starts, room, levels, costs)
        for start, cost in zip(starts, costs, strict=True):
            put_floats(code, code.load(cost, typ=FLOATS), told["costs"], start)


def _build_column(
    code: Code,
    told: dict[str, ir.Value],
    column: ir.Value,
    starts: list[ir.Value],
    room: ir.Value,
    levels: ir.Value,
    costs: list[ir.Value],
) -> None:
    """One column of some strips: what was pushed onto it, its integers, its errors."""
    row = code.times(column, told["rows"])
    places = [code.local(floats(code, told["columns"], code.plus(row, start))) for start in starts]
    factors = code.behind(told["factors"], code.times(column, told["count"]), FLOAT)
    with code.each(0, column) as earlier:
        factor = code.spread(code.read(factors, earlier, FLOAT, FLOAT))
        for strip, place in enumerate(places):
            error = code.read(room, code.plus(code.times(earlier, STRIPS), strip), FLOATS, FLOATS)
            code.update(place, FLOATS, code.fsub, code.fmul(factor, error))
    pivot = code.spread(code.read(factors, column, FLOAT, FLOAT))
    group = code.times(code.read(told["groups"], column, LONG, LONG), told["rows"])
    for strip, (start, place, cost) in enumerate(zip(starts, places, costs, strict=True)):
        w, at = code.load(place, typ=FLOATS), code.plus(row, start)
        scale, zero = (floats(code, told[name], code.plus(group, start)) for name in ("scales", "zeros"))
        q = nearest(code, w, scale, zero, levels)
        gap = code.fsub(w, code.fmul(code.fsub(q, zero), scale))
        error = code.fdiv(gap, pivot)
        code.write(error, room, code.plus(code.times(column, STRIPS), strip), FLOATS)
        put_floats(code, error, told["errors"], at)
        whole = code.run("llvm.fptosi.sat.v16i32.v16f32", vector(WORD), q)  # of no number: 0, as torch has it
        code.write(code.trunc(whole, vector(BYTE)), told["integers"], at, BYTE)
        code.update(cost, FLOATS, code.fadd, code.fmul(error, error))


def nearest(code: Code, w: ir.Value, scale: ir.Value, zero: ir.Value, levels: ir.Value) -> ir.Value:
    """clamp(round(w / scale + zero), 0, levels), of two the even one; what is no number stays none."""
    q = code.run("llvm.rint.v16f32", FLOATS, code.fadd(code.fdiv(w, scale), zero))
    q = code.select(code.fcmp_ordered("<", q, same(FLOAT, 0.0)), same(FLOAT, 0.0), q)
    return code.select(code.fcmp_ordered(">", q, levels), levels, q)
