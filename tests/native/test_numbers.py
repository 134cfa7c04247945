"""Activations in compiled code: read, rounded and stored as torch has them, multiplied and added by words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native.native_functions import in_both
from torch import Tensor

from qwenq.native import support


def made(dtype: torch.dtype, build: Any, *tensors: Tensor) -> None:
    """Run ``build(code, numbers, *addresses)`` over these tensors' memory."""
    from llvmlite import ir

    from qwenq.native.code import LONG, POINTER, Code, compiled
    from qwenq.native.numbers import NUMBERS

    module = ir.Module()
    code = Code(module, "piece", *(LONG,) * len(tensors))
    addresses = (code.inttoptr(address, POINTER) for address in code.function.args)
    build(code, NUMBERS[dtype], *addresses)
    code.ret_void()
    compiled(module, "piece", len(tensors))(*(x.data_ptr() for x in tensors))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@in_both
@pytest.mark.parametrize("lanes", [8, 16])
def test_what_is_read_is_stored_again(dtype: torch.dtype, lanes: int) -> None:
    x, y = drawn(0, 32).to(dtype), torch.zeros(32, dtype=dtype)

    def build(code: Any, numbers: Any, x: Any, y: Any) -> None:
        numbers.put(code, numbers.read(code, x, 3, lanes), y, 5)

    made(dtype, build, x, y)
    assert torch.equal(y[5 : 5 + lanes], x[3 : 3 + lanes])
    assert not y[:5].any() and not y[5 + lanes :].any()


@in_both
def test_rounding_is_what_storing_does(dtype: torch.dtype) -> None:
    x, rounded, stored, normal = drawn(0, 16), torch.zeros(16), *torch.zeros(2, 16, dtype=dtype)

    def build(code: Any, numbers: Any, x: Any, rounded: Any, stored: Any, normal: Any) -> None:
        from qwenq.native.floats import floats, put_floats

        value = floats(code, x, 0)
        put_floats(code, numbers.rounded(code, value), rounded, 0)
        numbers.put(code, value, stored, 0)
        numbers.put_normal(code, value, normal, 0)

    made(dtype, build, x, rounded, stored, normal)
    assert torch.equal(rounded, x.to(dtype).float())
    assert torch.equal(stored, x.to(dtype))
    assert torch.equal(normal, x.to(dtype))


@in_both
def test_words_of_two_operands_are_multiplied_and_added(dtype: torch.dtype) -> None:
    """A row's word with 16 columns: over as many tokens as share a word."""
    from qwenq.native.numbers import NUMBERS

    per_word = NUMBERS[dtype].per_word
    x, y, sums = drawn(0, per_word, 16).to(dtype), drawn(1, per_word, 16).to(dtype), drawn(2, 16)
    before = sums.clone()

    def build(code: Any, numbers: Any, x: Any, y: Any, sums: Any) -> None:
        from qwenq.native.code import LONG, WORD
        from qwenq.native.floats import FLOATS, put_floats
        from qwenq.native.numbers import add_to_tile

        rows = [LONG(16 * token) for token in range(numbers.per_word)]
        words = numbers.beside(code, x, rows)
        place = code.local(code.read(sums, 0, FLOATS, FLOATS))
        first = code.extract_element(words, WORD(5))
        add_to_tile(code, numbers, [[place]], [first], [numbers.beside(code, y, rows)])
        put_floats(code, code.load(place, typ=FLOATS), sums, 0)

    made(dtype, build, x, y, sums)
    torch.testing.assert_close(
        sums.double(), before.double() + x[:, 5].double() @ y.double(), rtol=1e-6, atol=1e-6
    )


def test_every_dtype_says_what_it_asks_of_the_cpu() -> None:
    pytest.importorskip("llvmlite")
    from qwenq.native.numbers import NUMBERS

    assert set(NUMBERS) == set(support.FEATURES)
    assert all(numbers.size == dtype.itemsize for dtype, numbers in NUMBERS.items())
    assert all(numbers.size * numbers.per_word == 4 for numbers in NUMBERS.values())
    assert "float16" in str(support.why_not_multiply(torch.float16))
