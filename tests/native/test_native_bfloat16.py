"""Rounding to bfloat16 in compiled code, against torch's, and what becomes of numbers that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native.native_functions import needs_native

pytestmark = needs_native


@pytest.fixture(scope="module")
def rounded() -> Callable[[torch.Tensor], torch.Tensor]:
    """float32, a multiple of 16 numbers, as bfloat16."""
    from llvmlite import ir

    from qwenq.native.bfloat16 import put_bfloat16
    from qwenq.native.code import LANES, LONG, POINTER, Code, compiled
    from qwenq.native.floats import floats

    module = ir.Module()
    code = Code(module, "rounded", LONG, LONG, LONG)
    x, y, count = code.function.args
    x, y = (code.inttoptr(address, POINTER) for address in (x, y))
    with code.each(0, count, LANES) as at:
        put_bfloat16(code, floats(code, x, at), y, at)
    code.ret_void()
    function = compiled(module, "rounded", 3)

    def run(numbers: torch.Tensor) -> torch.Tensor:
        made = torch.empty(numbers.shape, dtype=torch.bfloat16)
        function(numbers.data_ptr(), made.data_ptr(), numbers.numel())
        return made

    return run


def test_every_bfloat16_comes_back_as_it_was(rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Infinities, both zeros, and all that is no number: the lower halves of these floats are zero."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    floats = (bits.to(torch.int32) << 16).view(torch.float32)
    assert torch.equal(rounded(floats).view(torch.int16), bits)
    assert int(every.isnan().sum()) == 2 * 127


def test_floats_are_rounded_as_torch_rounds_them(rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (160_000,), generator=draw).to(torch.int32).view(torch.float32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000] * 4, dtype=torch.int32)
    x = torch.cat([drawn[drawn.isfinite()][: 150_000 // 16 * 16], ties.view(torch.float32)])
    assert torch.equal(rounded(x).view(torch.int16), x.bfloat16().view(torch.int16))


def test_what_the_cpu_makes_of_an_invalid_operation_stays_none(
    rounded: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    infinite = torch.full((16,), float("inf"))
    assert rounded(infinite - infinite).isnan().all()
    assert rounded(infinite * torch.zeros(16)).isnan().all()
