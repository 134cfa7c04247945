"""Functions of sixteen numbers, compiled, against float64."""

from __future__ import annotations

import pytest
import torch
from native.native_functions import elementwise, needs_native

pytestmark = needs_native


def test_powers_of_e_are_float32_s_own() -> None:
    from qwenq.native.floats import exponential

    x = torch.linspace(-87, 88, 160_000)
    found = elementwise(exponential)(x).double()
    exact = x.double().exp()
    assert ((found - exact).abs() / exact).max() < 2e-7
    ends = elementwise(exponential)(torch.tensor([float("-inf"), -1e9, float("inf"), 1e9] * 4))
    assert (ends[0::4] < 1e-37).all()
    assert torch.isfinite(ends).all()


def test_what_is_no_number_stays_none() -> None:
    from qwenq.native.floats import exponential, sigmoid

    x = torch.full((16,), float("nan"))
    assert elementwise(exponential)(x).isnan().all()
    assert elementwise(sigmoid)(x).isnan().all()


def test_sigmoid_from_end_to_end() -> None:
    from qwenq.native.floats import sigmoid

    x = torch.cat([torch.linspace(-100, 100, 16_000 - 16), torch.tensor([float("inf"), float("-inf")] * 8)])
    torch.testing.assert_close(
        elementwise(sigmoid)(x), torch.sigmoid(x.double()).float(), atol=1e-7, rtol=1e-6
    )


@pytest.mark.parametrize("count", [-3, 0, 1, 7, 16, 40])
def test_lanes_before_a_count_stay(count: int) -> None:
    from qwenq.native.code import LONG
    from qwenq.native.floats import lanes_before

    x = torch.arange(16.0)
    found = elementwise(lambda code, value: lanes_before(code, LONG(count), value, -1.0))(x)
    assert torch.equal(found, torch.where(x < count, x, -1.0))
