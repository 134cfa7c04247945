"""A group's scale, chosen anew, as code for CPUs with AVX-512: see ``refit``."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.gptq.columns import Block
from qwenq.gptq.grid import LARGEST, SMALLEST
from qwenq.gptq.native_strips import STRIPS, built, call, require
from qwenq.gptq.refit import Fitted
from qwenq.native.code import BYTE, FLOAT, HALF, Code, same, vector
from qwenq.native.floats import FLOATS, floats, multiply_add, put_floats

_TENSORS = (
    "gradient", "values", "H", "scale", "zero", "integers", "errors", "new_scale", "new_values", "less",
    "change",
)  # fmt: skip


def fit_natively(block: Block, values: Tensor, group: int) -> Fitted:
    """See ``refit.fit_scale``.

    Raises:
        ValueError: other shapes or dtypes than it says, or fewer than 16 rows.
    """
    require(block, values=values)
    old, zero, H = block.scales[group], block.zeros[group], block.U.contiguous()
    fitted = Fitted(*(torch.empty_like(like) for like in (old, values, values, old)))
    call(
        _code(), block, block.columns, values, H, old, zero, block.integers, block.errors, *fitted
    )  # fmt: skip
    return fitted


@cache
def _code() -> Any:
    return built("fit", _TENSORS, _build)


def _build(code: Code, told: dict[str, ir.Value], starts: list[ir.Value]) -> None:
    """First u, into the room; then what it makes of H; then the scale, and what the group is with it."""
    zeros = [floats(code, told["zero"], start) for start in starts]
    with code.each(0, told["count"]) as column:
        row = code.times(column, told["rows"])
        for strip, (start, zero) in enumerate(zip(starts, zeros, strict=True)):
            z = code.read(told["integers"], code.plus(row, start), vector(BYTE), BYTE)
            u = code.fsub(code.uitofp(z, FLOATS), zero)
            code.write(u, told["room"], _place(code, column, strip), FLOATS)
    slopes, curves = ([code.local(same(FLOAT, 0.0)) for _ in starts] for _ in range(2))
    with code.each(0, told["count"]) as column:
        _build_sums(code, told, column, starts, slopes, curves)
    scales = []
    for start, slope, curve in zip(starts, slopes, curves, strict=True):
        old, *sums = (floats(code, told["scale"], start), *(code.load(x, typ=FLOATS) for x in (slope, curve)))
        scale, change = _best(code, old, *sums)
        scales.append(scale)
        put_floats(code, scale, told["new_scale"], start)
        put_floats(code, change, told["change"], start)
    with code.each(0, told["count"]) as column:
        for strip, (start, scale) in enumerate(zip(starts, scales, strict=True)):
            at = code.plus(code.times(column, told["rows"]), start)
            u = code.read(told["room"], _place(code, column, strip), FLOATS, FLOATS)
            value = code.fmul(u, scale)
            put_floats(code, value, told["new_values"], at)
            put_floats(code, code.fsub(floats(code, told["values"], at), value), told["less"], at)


def _place(code: Code, column: ir.Value, strip: int) -> ir.Value:
    return code.plus(code.times(column, STRIPS), strip)


def _build_sums(
    code: Code,
    told: dict[str, ir.Value],
    column: ir.Value,
    starts: list[ir.Value],
    slopes: list[ir.Value],
    curves: list[ir.Value],
) -> None:
    """A column's share of uᵀG and uᵀHu; what the moves changed in G is −H · errors, and H is symmetric."""
    row = code.times(column, told["rows"])
    H = code.behind(told["H"], code.times(column, told["count"]), FLOAT)
    products = [code.local(same(FLOAT, 0.0)) for _ in starts]
    with code.each(0, told["count"]) as other:
        h = code.spread(code.read(H, other, FLOAT, FLOAT))
        for strip, product in enumerate(products):
            u = code.read(told["room"], _place(code, other, strip), FLOATS, FLOATS)
            code.store(multiply_add(code, h, u, code.load(product, typ=FLOATS)), product)
    for strip, (start, product) in enumerate(zip(starts, products, strict=True)):
        u = code.read(told["room"], _place(code, column, strip), FLOATS, FLOATS)
        Hu, at = code.load(product, typ=FLOATS), code.plus(row, start)
        g, error = (floats(code, told[name], at) for name in ("gradient", "errors"))
        code.update(slopes[strip], FLOATS, code.fadd, code.fsub(code.fmul(u, g), code.fmul(error, Hu)))
        code.update(curves[strip], FLOATS, code.fadd, code.fmul(u, Hu))


def _best(code: Code, old: ir.Value, slope: ir.Value, curve: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The scale of least error as it is stored, where that is better; and the change."""
    zero = same(FLOAT, 0.0)
    wanted = code.fsub(old, code.fdiv(slope, curve))
    bounded = code.select(code.fcmp_ordered(">", wanted, same(FLOAT, LARGEST)), same(FLOAT, LARGEST), wanted)
    bounded = code.select(
        code.fcmp_ordered("<", bounded, same(FLOAT, -LARGEST)), same(FLOAT, -LARGEST), bounded
    )
    stored = code.fpext(code.fptrunc(bounded, vector(HALF)), FLOATS)
    size = code.run("llvm.fabs.v16f32", FLOATS, stored)
    least = code.select(code.fcmp_ordered("<", wanted, zero), same(FLOAT, -SMALLEST), same(FLOAT, SMALLEST))
    stored = code.select(code.fcmp_ordered("<", size, same(FLOAT, SMALLEST)), least, stored)
    finite = code.fcmp_ordered("<", code.run("llvm.fabs.v16f32", FLOATS, wanted), same(FLOAT, float("inf")))
    usable = code.and_(finite, code.fcmp_ordered("!=", wanted, zero))
    step = code.fsub(code.select(usable, stored, old), old)
    change = code.fmul(step, code.fadd(slope, code.fmul(step, code.fmul(curve, same(FLOAT, 0.5)))))
    better = code.fcmp_ordered("<", change, zero)
    return code.select(better, stored, old), code.select(better, change, zero)
