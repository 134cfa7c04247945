"""The columns of a block of coordinate descent as code for CPUs with AVX-512: torch's bits, see ``moves``."""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from torch import Tensor

from qwenq.gptq.columns import Block
from qwenq.gptq.native_columns import Strip, build_columns, run_columns
from qwenq.gptq.native_strips import nearest
from qwenq.native.code import FLOAT, Code, same
from qwenq.native.floats import floats


def move_natively(block: Block, values: Tensor) -> Tensor:
    """See ``moves.move_columns``; the gradients stay as they were.

    Raises:
        ValueError: other shapes or dtypes than it says, or fewer than 16 rows.
    """
    return run_columns(_code(), block, block.U.contiguous(), values)


@cache
def _code() -> Any:
    return build_columns("move", _moved)


def _moved(code: Code, strip: Strip) -> tuple[ir.Value, ir.Value, ir.Value]:
    """To q − G / H_ii, as near as the grid allows; in one integer the objective is a parabola."""
    before = floats(code, strip.before, 0)
    wanted = code.fsub(before, code.fdiv(strip.value, strip.pivot))
    q = nearest(code, wanted, strip.scale, strip.zero, strip.levels)
    less = code.fsub(before, code.fmul(code.fsub(q, strip.zero), strip.scale))
    half = code.fmul(strip.pivot, same(FLOAT, 0.5))
    return q, less, code.fmul(less, code.fsub(code.fmul(less, half), strip.value))
