"""Sums that come out the same in whatever order and on however many processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.distributed import Team
from qwenq.gptq.hessian import PANEL, mean_products
from qwenq.gptq.hessian import hessian as by_team

WIDTH = 40


def hessian(inputs: list[torch.Tensor]) -> torch.Tensor:
    """As ranks of torchrun sum it."""
    return by_team(inputs, Team(launched=True))


def batches(seed: int, count: int = 7, spread: float = 4.0) -> list[torch.Tensor]:
    """Columns of very different sizes, and a few tokens that are far larger than the others."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-spread, spread, WIDTH)
    made = [torch.randn(50, WIDTH, generator=draw) * scales for _ in range(count)]
    made[0][3] *= 1000
    return made


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), order=st.permutations(range(7)))
def test_exact_sums_have_the_same_bits_in_any_order_of_batches(seed: int, order: list[int]) -> None:
    given = batches(seed)
    assert torch.equal(hessian(given), hessian([given[index] for index in order]))


def test_a_plain_running_sum_does_depend_on_the_order() -> None:
    """Or the test above would prove nothing."""
    given = batches(0)
    sums = [torch.stack([x.T @ x for x in parts]).sum(0) for parts in (given, given[::-1])]
    assert not torch.equal(*sums)


@pytest.mark.parametrize("spread", [0.0, 4.0, 10.0])
def test_exact_sums_are_as_precise_as_float32_for_columns_of_any_size(spread: float) -> None:
    given = batches(1, spread=spread)
    x = torch.cat(given).double()
    exact = 2 / x.shape[0] * x.T @ x
    size = exact.diagonal().sqrt()
    scaled = size[:, None] * size
    error = (hessian(given).double() - exact).abs() / scaled
    plain = 2 / x.shape[0] * torch.stack([part.T @ part for part in given]).sum(0)
    assert error.max() <= 1e-7 + ((plain.double() - exact).abs() / scaled).max()


def test_exact_sums_keep_zero_and_tiny_columns() -> None:
    x = torch.randn(64, 4)
    x[:, 1] = 0
    x[:, 2] *= 1e-18
    got = hessian([x])
    assert (got[1] == 0).all()
    assert got[0, 2] != 0
    torch.testing.assert_close(
        got[0, 2].double(), 2 / 64 * x[:, 0].double() @ x[:, 2].double(), rtol=1e-5, atol=0
    )


def test_mean_products_of_different_widths() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(30, width, generator=draw) for width in (PANEL + 8, 12))
    got = mean_products(lambda _, some: left[:, some], lambda _, some: right[:, some], [30], (PANEL + 8, 12))
    assert got is not None
    torch.testing.assert_close(got, 2 / 30 * left.T @ right, rtol=1e-4, atol=1e-5)


def test_mean_products_of_no_tokens_are_none() -> None:
    assert mean_products(lambda *_: torch.empty(0), lambda *_: torch.empty(0), [], (4, 4)) is None
