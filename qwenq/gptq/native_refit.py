"""The parabola that an objective is in a group's scale, as code for CPUs with AVX-512: see ``refit``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.gptq.columns import Block
from qwenq.gptq.native_strips import STRIPS, built, call, require
from qwenq.native.code import BYTE, FLOAT, Code, same, vector
from qwenq.native.floats import FLOATS, floats, multiply_add, put_floats

_TENSORS = ("gradient", "H", "zero", "integers", "errors", "slopes", "curves")


def parabola_natively(block: Block, group: int) -> tuple[Tensor, Tensor]:
    """See ``refit``: uᵀG and uᵀHu, [rows] each.

    Raises:
        ValueError: other shapes or dtypes than it says, or fewer than 16 rows.
    """
    require(block)
    slopes, curves = (torch.empty_like(block.columns[0]) for _ in range(2))
    zero = block.zeros[group]
    call(
        _code(),
        block,
        block.columns,
        block.U.contiguous(),
        zero,
        block.integers,
        block.errors,
        slopes,
        curves,
    )
    return slopes, curves


@cache
def _code() -> Any:
    return built("parabola", _TENSORS, _build)


def _build(code: Code, told: dict[str, ir.Value], starts: list[ir.Value]) -> None:
    """First u, into the room; then Hu, a column after the other."""
    room, count = told["room"], told["count"]
    zeros = [floats(code, told["zero"], start) for start in starts]
    with code.each(0, count) as column:
        row = code.times(column, told["rows"])
        for strip, (start, zero) in enumerate(zip(starts, zeros, strict=True)):
            z = code.read(told["integers"], code.plus(row, start), vector(BYTE), BYTE)
            u = code.fsub(code.uitofp(z, FLOATS), zero)
            code.write(u, room, code.plus(code.times(column, STRIPS), strip), FLOATS)
    sums = [[code.local(same(FLOAT, 0.0)) for _ in starts] for _ in range(2)]
    with code.each(0, count) as column:
        _build_column(code, told, column, starts, sums)
    for places, name in zip(sums, ("slopes", "curves"), strict=True):
        for start, place in zip(starts, places, strict=True):
            put_floats(code, code.load(place, typ=FLOATS), told[name], start)


def _build_column(
    code: Code,
    told: dict[str, ir.Value],
    column: ir.Value,
    starts: list[ir.Value],
    sums: list[list[ir.Value]],
) -> None:
    """A column's share of uᵀG and uᵀHu; what the moves changed in G is −H · errors, and H is symmetric."""
    room, row = told["room"], code.times(column, told["rows"])
    H = code.behind(told["H"], code.times(column, told["count"]), FLOAT)
    products = [code.local(same(FLOAT, 0.0)) for _ in starts]
    with code.each(0, told["count"]) as other:
        h = code.spread(code.read(H, other, FLOAT, FLOAT))
        for strip, product in enumerate(products):
            u = code.read(room, code.plus(code.times(other, STRIPS), strip), FLOATS, FLOATS)
            code.store(multiply_add(code, h, u, code.load(product, typ=FLOATS)), product)
    for strip, (start, product) in enumerate(zip(starts, products, strict=True)):
        u = code.read(room, code.plus(code.times(column, STRIPS), strip), FLOATS, FLOATS)
        Hu, at = code.load(product, typ=FLOATS), code.plus(row, start)
        g, error = (floats(code, told[name], at) for name in ("gradient", "errors"))
        share = code.fsub(code.fmul(u, g), code.fmul(error, Hu))
        code.update(sums[0][strip], FLOATS, code.fadd, share)
        code.update(sums[1][strip], FLOATS, code.fadd, code.fmul(u, Hu))
