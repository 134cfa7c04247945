"""The search for scales that the Hessian weighs, as code for CPUs with AVX-512: see ``scales``.

A group goes through all its candidates while its weights are in the cache. Costs are what torch computes, bit
for bit, the order in which a group's shares are added included: so is the choice.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.gptq.native_strips import nearest
from qwenq.gptq.scales import REFITS, SHRINK
from qwenq.native.code import (
    FLOAT,
    HALF,
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
from qwenq.native.floats import FLOATS, float_bits, floats, told_float

_POINTERS = ("weights", "importance", "scales", "zeros", "shrink")
_TOLD = (*_POINTERS, "groups", "per_row", "size", "candidates", "levels", "sym")


def search_natively(
    grouped: Tensor, importance: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, sym: bool
) -> None:
    """Replace the scales and zeros of min/max by those that cost least.

    Args:
        grouped: [rows · groups, group_size] float32, row by row; group_size a multiple of 16.
        importance: [groups · group_size] float32.
        scales, zeros: [rows · groups] float32; changed in place.
        bits: 2…8.
        sym: zeros stay.

    Raises:
        ValueError: other shapes or dtypes.
    """
    count, size = grouped.shape
    importance, shrink = importance.contiguous(), SHRINK.contiguous()
    per_row = importance.numel() // size
    for x, shape in (
        (grouped, (count, size)),
        (importance, (per_row * size,)),
        (scales, (count,)),
        (zeros, (count,)),
    ):
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape != shape or not x.is_contiguous():
            raise ValueError(
                f"{x.dtype} {list(x.shape)} on {x.device}, not float32 {list(shape)} in one piece"
            )
    if size % LANES or count % per_row:
        raise ValueError(f"{count} groups of {size}, {per_row} to a row")
    _code()(
        grouped.data_ptr(), importance.data_ptr(), scales.data_ptr(), zeros.data_ptr(), shrink.data_ptr(),
        count, per_row, size, len(shrink), float_bits((1 << bits) - 1), int(sym), torch.get_num_threads(),
    )  # fmt: skip


class _Group(NamedTuple):
    """One group in the code that is built: where it lies, and variables for the best so far."""

    weights: ir.Value
    importance: ir.Value
    size: ir.Value
    levels: ir.Value
    cost: ir.Value
    scale: ir.Value
    zero: ir.Value


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
    with code.each(*code.share(told["groups"])) as index:
        _build_group(code, told, index)
    code.ret_void()
    on_all_threads(module, "search", "thread", len(_TOLD))
    return compiled(module, "search", len(_TOLD) + 1)


def _build_group(code: Code, told: dict[str, ir.Value], index: ir.Value) -> None:
    size, sym = told["size"], code.icmp_signed("!=", told["sym"], LONG(0))
    levels = told_float(code, told["levels"])
    first_scale, first_zero = (code.read(told[name], index, FLOAT, FLOAT) for name in ("scales", "zeros"))
    best = [code.local(value) for value in (FLOAT(float("inf")), first_scale, first_zero)]
    column = code.times(code.srem(index, told["per_row"]), size)
    group = _Group(
        code.behind(told["weights"], code.times(index, size), FLOAT),
        code.behind(told["importance"], column, FLOAT),
        size,
        code.spread(levels),
        *best,
    )
    low = code.fmul(code.fneg(first_zero), first_scale)  # real value of integer 0
    with code.each(0, told["candidates"]) as candidate:
        fraction = code.read(told["shrink"], candidate, FLOAT, FLOAT)
        scale = code.fmul(first_scale, fraction)
        zero = code.run("llvm.rint.f32", FLOAT, code.fdiv(code.fmul(code.fneg(low), fraction), scale))
        zero = code.select(code.fcmp_ordered("<", zero, FLOAT(1.0)), FLOAT(1.0), zero)
        zero = code.select(code.fcmp_ordered(">", zero, levels), levels, zero)
        _build_consider(code, group, scale, code.select(sym, first_zero, zero))
    with code.each(0, REFITS):
        _build_consider(code, group, _build_refit(code, group), code.load(group.zero, typ=FLOAT))
    for name, place in (("scales", group.scale), ("zeros", group.zero)):
        code.write(code.load(place, typ=FLOAT), told[name], index, FLOAT)


def _build_consider(code: Code, group: _Group, scale: ir.Value, zero: ir.Value) -> None:
    """Keep a candidate that costs less than the best; it is judged as it will be read back."""
    scale = code.fpext(code.fptrunc(scale, HALF), FLOAT)
    in_all, total = code.spread(scale), code.local(same(FLOAT, 0.0))
    with code.each(0, group.size, LANES) as at:
        w, h, q = _build_steps(code, group, at, in_all, code.spread(zero))
        gap = code.fsub(code.fmul(q, in_all), w)
        code.update(total, FLOATS, code.fadd, code.fmul(code.fmul(gap, gap), h))
    cost = _total(code, total)
    better = code.fcmp_ordered("<", cost, code.load(group.cost, typ=FLOAT))
    for place, value in ((group.cost, cost), (group.scale, scale), (group.zero, zero)):
        code.store(code.select(better, value, code.load(place, typ=FLOAT)), place)


def _build_refit(code: Code, group: _Group) -> ir.Value:
    """The scale of least squares for the best's integers; the best's where there is none."""
    best = code.load(group.scale, typ=FLOAT)
    scale, zero = code.spread(best), code.spread(code.load(group.zero, typ=FLOAT))
    above, below = code.local(same(FLOAT, 0.0)), code.local(same(FLOAT, 0.0))
    with code.each(0, group.size, LANES) as at:
        w, h, q = _build_steps(code, group, at, scale, zero)
        hq = code.fmul(h, q)
        code.update(above, FLOATS, code.fadd, code.fmul(hq, w))
        code.update(below, FLOATS, code.fadd, code.fmul(hq, q))
    fitted = code.fdiv(_total(code, above), _total(code, below))
    size = code.run("llvm.fabs.f32", FLOAT, fitted)
    usable = code.and_(
        code.fcmp_ordered("<", size, FLOAT(float("inf"))), code.fcmp_ordered(">", size, FLOAT(0.0))
    )
    return code.select(usable, fitted, best)


def _build_steps(
    code: Code, group: _Group, at: ir.Value, scale: ir.Value, zero: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """16 weights, their importance, and what they are rounded to in steps from the zero point."""
    w, h = floats(code, group.weights, at), floats(code, group.importance, at)
    return w, h, code.fsub(nearest(code, w, scale, zero, group.levels), zero)


def _total(code: Code, place: ir.Value) -> ir.Value:
    """The sum of a variable's 16 lanes by halves, as ``scales`` adds them."""
    lanes, half = code.load(place, typ=FLOATS), LANES // 2
    while half:
        upper = ir.Constant(vector(WORD), [(lane + half) % LANES for lane in range(LANES)])
        lanes, half = code.fadd(lanes, code.shuffle_vector(lanes, lanes, upper)), half // 2
    return code.extract_element(lanes, WORD(0))
