"""Plain linear layers multiply as ``torch.nn.functional.linear`` does, in any dtype and of any shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwenq.runtime.linear import Dense

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(384, 96), (1187, 64), (5, 3)])
@pytest.mark.parametrize("lead", [(1,), (2,), (32,), (33,), (2, 7), (1, 1), (0,)])
def test_products_are_exact_enough(
    dtype: torch.dtype,
    with_bias: bool,
    out_features: int,
    in_features: int,
    lead: tuple[int, ...],
) -> None:
    weight, x = random(out_features, in_features, dtype=dtype), random(*lead, in_features, dtype=dtype)
    bias = random(out_features, dtype=dtype) if with_bias else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    found = Dense(weight, bias)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), exact, atol=TOLERANCE[dtype] * in_features**0.5, rtol=TOLERANCE[dtype]
    )


def test_an_input_may_be_a_slice_of_something_wider() -> None:
    weight, wide = random(128, 64), random(6, 96)
    torch.testing.assert_close(Dense(weight)(wide[:, 16:80]), wide[:, 16:80] @ weight.t(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_not_copied(dtype: torch.dtype) -> None:
    weight, bias = random(48, 40, dtype=dtype), random(48, dtype=dtype)
    layer = Dense(weight, bias)
    assert layer.weight is weight
    assert layer.nbytes == (48 * 40 + 48) * dtype.itemsize
