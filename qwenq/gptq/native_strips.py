"""Blocks of columns as code for CPUs with AVX-512 sees them: for each thread, strips of 16 rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.gptq.columns import FEWEST_ROWS, Block
from qwenq.native.code import FLOAT, LANES, LONG, POINTER, Code, compiled, on_all_threads, same
from qwenq.native.floats import FLOATS, float_bits, told_float

STRIPS = 4
"""That a thread takes at a time: an operation that waits for the last one of its strip lets others pass."""

_NUMBERS = ("count", "rows", "levels")

Body = Callable[[Code, dict[str, ir.Value], list[ir.Value]], None]
"""Builds what happens to strips: told where the tensors, ``room`` and numbers are; the strips' first rows."""


def built(name: str, tensors: Sequence[str], body: Body) -> Any:
    """A function over blocks, see ``call``.

    The last strips overlap where rows are no multiple: what a body writes must not depend on what it wrote.
    """
    module = ir.Module()
    code = Code(module, "thread", POINTER)
    (job,) = code.function.args
    pointers = (*tensors, "rooms")
    told = {
        each: code.read(job, place, POINTER if each in pointers else LONG, LONG)
        for place, each in enumerate((*pointers, *_NUMBERS))
    }
    rows = told["rows"]
    told["room"] = code.behind(told["rooms"], code.times(code.thread(), told["count"], STRIPS), FLOATS)
    told["levels"] = code.spread(told_float(code, told["levels"]))
    last = code.sub(rows, LONG(LANES))
    units = code.sdiv(code.plus(rows, STRIPS * LANES - 1), LONG(STRIPS * LANES))
    with code.each(*code.share(units)) as unit:
        starts = [code.plus(code.times(unit, STRIPS * LANES), strip * LANES) for strip in range(STRIPS)]
        body(code, told, [code.select(code.icmp_signed("<", start, last), start, last) for start in starts])
    code.ret_void()
    on_all_threads(module, name, "thread", len(told) - 1)
    return compiled(module, name, len(told))


def call(function: Any, block: Block, *tensors: Tensor) -> None:
    """Run it on all threads.

    Args:
        function: of ``built``.
        block: whose shape it works on; see ``require``.
        tensors: as it names them.
    """
    count, rows = block.columns.shape
    threads = torch.get_num_threads()
    rooms = torch.empty(threads, count * STRIPS * LANES)
    places = [tensor.data_ptr() for tensor in (*tensors, rooms)]
    function(*places, count, rows, float_bits(block.levels), threads)


def require(block: Block, **others: Tensor) -> None:
    """Compiled code reads memory as it is told to: what it is told has to be true.

    Args:
        block: any.
        others: tensors like its columns.

    Raises:
        ValueError: other shapes or dtypes than ``Block`` says, or fewer than 16 rows.
    """
    count, rows = block.columns.shape
    kinds = {"integers": torch.uint8}
    shapes = {"U": (count, count), "scales": block.scales.shape, "zeros": block.scales.shape}
    tensors = {name: x for name, x in block._asdict().items() if isinstance(x, Tensor)} | others
    for name, x in tensors.items():
        kind, shape = kinds.get(name, torch.float32), shapes.get(name, (count, rows))
        if x.dtype != kind or x.device.type != "cpu" or x.shape != shape:
            raise ValueError(f"{name}: {x.dtype} {list(x.shape)} on {x.device}, not {kind} {list(shape)}")
        if name != "U" and not x.is_contiguous():
            raise ValueError(f"{name} do not lie in one piece")
    if block.scales.shape[1] != rows or rows < FEWEST_ROWS:
        raise ValueError(f"{rows} rows, and scales for {block.scales.shape[1]}")
    if len(block.groups) != count or min(block.groups) < 0 or max(block.groups) >= len(block.scales):
        raise ValueError(f"{count} columns in groups {block.groups} of {len(block.scales)}")


def nearest(code: Code, w: ir.Value, scale: ir.Value, zero: ir.Value, levels: ir.Value) -> ir.Value:
    """clamp(round(w / scale + zero), 0, levels), of two the even one; what is no number stays none."""
    q = code.run("llvm.rint.v16f32", FLOATS, code.fadd(code.fdiv(w, scale), zero))
    q = code.select(code.fcmp_ordered("<", q, same(FLOAT, 0.0)), same(FLOAT, 0.0), q)
    return code.select(code.fcmp_ordered(">", q, levels), levels, q)
