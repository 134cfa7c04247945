"""Pieces of native code as functions over float32 tensors, and what machines tests of native code need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenq.native import support

_UNABLE = support.why_not("avx512f", "avx512bw", "avx512vl", "avx512vnni")
needs_native = pytest.mark.skipif(_UNABLE is not None, reason=f"no native code here: {_UNABLE}")

UNABLE = {dtype: support.why_not_multiply(dtype) for dtype in support.FEATURES}
needs_float32, needs_bfloat16 = (
    pytest.mark.skipif(UNABLE[dtype] is not None, reason=f"no native code here: {UNABLE[dtype]}")
    for dtype in (torch.float32, torch.bfloat16)
)
in_both = pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=needs_float32), pytest.param(torch.bfloat16, marks=needs_bfloat16)],
)


def elementwise(piece: Callable[[Any, Any], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """``piece(code, value)`` over a tensor of a multiple of 16 numbers."""
    from llvmlite import ir

    from qwenq.native.code import LANES, LONG, POINTER, Code, compiled
    from qwenq.native.floats import floats, put_floats

    module = ir.Module()
    code = Code(module, "piece", LONG, LONG, LONG)
    x, y, count = code.function.args
    x, y = (code.inttoptr(address, POINTER) for address in (x, y))
    with code.each(0, count, LANES) as at:
        put_floats(code, piece(code, floats(code, x, at)), y, at)
    code.ret_void()
    function = compiled(module, "piece", 3)

    def run(numbers: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(numbers)
        function(numbers.data_ptr(), made.data_ptr(), numbers.numel())
        return made

    return run
