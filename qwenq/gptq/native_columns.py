"""The columns of a lazy block as code for CPUs with AVX-512: the same bits as torch's, see ``columns``.

What the columns before it have to push onto a column is subtracted when its turn comes, in their order: the
same differences as when each pushes at once, but they stay in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.gptq.columns import Block
from qwenq.gptq.native_strips import STRIPS, built, call, nearest, require
from qwenq.native.code import BYTE, FLOAT, LONG, WORD, Code, same, vector
from qwenq.native.floats import FLOATS, floats, put_floats

_TENSORS = ("columns", "values", "factors", "scales", "zeros", "groups", "integers", "errors", "costs")


class Strip(NamedTuple):
    """16 rows of a column, in the code that is built.

    Attributes:
        value: what lay in ``columns``, less what earlier columns pushed onto it.
        scale, zero: of its group.
        pivot: the diagonal of the factors, in all lanes.
        levels: the largest integer, in all lanes.
        before: the address of its ``values``.
    """

    value: ir.Value
    scale: ir.Value
    zero: ir.Value
    pivot: ir.Value
    levels: ir.Value
    before: ir.Value


Rule = Callable[[Code, Strip], tuple[ir.Value, ir.Value, ir.Value]]
"""Builds what becomes of a strip: its integers, the errors that it pushes on, its share of the costs."""


def round_natively(block: Block) -> Tensor:
    """See ``columns.round_columns``; the columns stay as they were.

    Raises:
        ValueError: other shapes or dtypes than ``Block`` says, or fewer than 16 rows.
    """
    return run_columns(_code(), block, block.U.T.contiguous(), block.columns)


@cache
def _code() -> Any:
    return build_columns("round", _rounded)


def _rounded(code: Code, strip: Strip) -> tuple[ir.Value, ir.Value, ir.Value]:
    """e = (w − q) / U_ii, and its square."""
    q = nearest(code, strip.value, strip.scale, strip.zero, strip.levels)
    gap = code.fsub(strip.value, code.fmul(code.fsub(q, strip.zero), strip.scale))
    error = code.fdiv(gap, strip.pivot)
    return q, error, code.fmul(error, error)


def run_columns(code: Any, block: Block, factors: Tensor, values: Tensor) -> Tensor:
    """Call what ``build_columns`` has built; returns the costs, [rows].

    Args:
        code: it.
        block: filled.
        factors: [block, block] contiguous; what is pushed onto a column lies in a row.
        values: [block, rows], as ``block.columns``.
    """
    require(block, values=values)
    groups, costs = torch.tensor(block.groups), torch.empty_like(block.columns[0])
    columns, _, scales, zeros, _, _, integers, errors = block
    call(code, block, columns, values, factors, scales, zeros, groups, integers, errors, costs)
    return costs


def build_columns(name: str, rule: Rule) -> Any:
    """Strips through all columns of a block, one after the other."""

    def body(code: Code, told: dict[str, ir.Value], starts: list[ir.Value]) -> None:
        costs = [code.local(same(FLOAT, 0.0)) for _ in starts]
        with code.each(0, told["count"]) as column:
            _build_column(code, told, column, starts, costs, rule)
        for start, cost in zip(starts, costs, strict=True):
            put_floats(code, code.load(cost, typ=FLOATS), told["costs"], start)

    return built(name, _TENSORS, body)


def _build_column(
    code: Code,
    told: dict[str, ir.Value],
    column: ir.Value,
    starts: list[ir.Value],
    costs: list[ir.Value],
    rule: Rule,
) -> None:
    """One column of some strips: what was pushed onto it, its integers, its errors."""
    row, room = code.times(column, told["rows"]), told["room"]
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
        at = code.plus(row, start)
        scale, zero = (floats(code, told[name], code.plus(group, start)) for name in ("scales", "zeros"))
        before = code.behind(told["values"], at, FLOAT)
        value = code.load(place, typ=FLOATS)
        q, error, share = rule(code, Strip(value, scale, zero, pivot, told["levels"], before))
        code.write(error, room, code.plus(code.times(column, STRIPS), strip), FLOATS)
        put_floats(code, error, told["errors"], at)
        whole = code.run("llvm.fptosi.sat.v16i32.v16f32", vector(WORD), q)  # of no number: 0, as torch has it
        code.write(code.trunc(whole, vector(BYTE)), told["integers"], at, BYTE)
        code.update(cost, FLOATS, code.fadd, share)
