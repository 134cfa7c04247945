from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.distributed import ALONE, Team
from qwenq.gptq.hessian import PANEL, hessian


def exact(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return 2 / x.shape[0] * x.T @ x


LAUNCHED = Team(launched=True)


def measured(*parts: torch.Tensor) -> torch.Tensor:
    """As one process sums, once what ranks of torchrun would find has been held against it."""
    alone = hessian(parts)
    torch.testing.assert_close(hessian(parts, LAUNCHED), alone, rtol=1e-5, atol=1e-5, equal_nan=True)
    return alone


@pytest.mark.parametrize("width", [1, 48, PANEL, PANEL + 40])
def test_the_hessian_is_twice_the_mean_outer_product(width: int) -> None:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(width))
    got = measured(x)
    assert got.dtype is torch.float32
    assert torch.equal(got, got.T)
    torch.testing.assert_close(got.double(), exact(x), rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 199), max_size=4))
def test_the_running_mean_does_not_depend_on_how_tokens_are_split(seed: int, cuts: list[int]) -> None:
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(seed))
    parts = torch.tensor_split(x, sorted(set(cuts)))
    torch.testing.assert_close(measured(*parts).double(), exact(x), rtol=1e-5, atol=1e-5)


def test_leading_dimensions_of_activations_are_flattened_to_tokens() -> None:
    x = torch.randn(3, 5, 7, 16)
    assert torch.equal(measured(x), measured(x.reshape(-1, 16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """4096 times 0.1²: bfloat16 would stop counting long before the end."""
    x = torch.full((4096, 8), 0.1, dtype=dtype)
    got = measured(*x.split(64))
    torch.testing.assert_close(got.double(), exact(x), rtol=1e-5, atol=0)
    assert got.dtype is torch.float32


def test_float16_inputs_do_not_overflow_in_the_hessian() -> None:
    x = torch.full((16, 8), 6e4, dtype=torch.float16)
    assert measured(x).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_infinite_activation_reaches_the_diagonal(bad: float) -> None:
    """``damp_hessian`` looks at the diagonal alone."""
    x = torch.randn(32, 600)
    x[7, 550] = bad
    good = torch.randn(32, 600)
    assert not measured(good, x, good).diagonal()[550].isfinite()


@pytest.mark.parametrize("team", [ALONE, LAUNCHED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hessian_of_no_tokens_is_an_error(team: Team, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        hessian([torch.empty(0, 16, dtype=dtype)], team)
