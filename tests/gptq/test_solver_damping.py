from __future__ import annotations

import pytest
import torch
from problems import problem

from qwenq.errors import QuantisationError
from qwenq.gptq.solver import damp_hessian, inverse_factor, order_by_diagonal

NATURAL = torch.arange(64)


def singular(rank: int = 8) -> torch.Tensor:
    return problem(0, tokens=rank).H


def test_a_sound_hessian_gets_the_damping_that_was_asked_for() -> None:
    H = problem(0).H
    expected = H + 0.01 * H.diagonal().mean() * torch.eye(64)
    result = damp_hessian(H.clone(), 0.01, NATURAL)
    assert result.damp == 0.01
    assert result.dead == 0
    torch.testing.assert_close(result.H, expected)
    torch.testing.assert_close(result.U, inverse_factor(expected), rtol=1e-3, atol=1e-4)


def test_a_singular_hessian_gets_more_and_the_result_says_how_much() -> None:
    H = singular()
    mean = H.diagonal().mean()
    assert inverse_factor(H + 1e-9 * mean * torch.eye(64)) is None
    result = damp_hessian(H.clone(), 1e-9, order_by_diagonal(H))
    assert result.damp > 1e-9
    assert result.U.isfinite().all()
    torch.testing.assert_close(
        result.H.diagonal() - H.diagonal(), (result.damp * mean).expand(64), rtol=0.05, atol=1e-7
    )


def test_bisection_finds_the_least_damping_that_works() -> None:
    """A matrix with a known negative eigenvalue: the least damping is that eigenvalue's size."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.linspace(1, 2, 64)
    values[0] = -0.3
    H = (basis * values) @ basis.T
    H = (H + H.T) / 2
    least = 0.3 / float(H.diagonal().mean())
    result = damp_hessian(H.clone(), 0.01, NATURAL)
    assert least <= result.damp <= 1.06 * least


def test_dead_columns_are_counted_and_leave_the_others_alone() -> None:
    H = problem(1).H
    for column in (3, 40):
        H[column] = 0
        H[:, column] = 0
    result = damp_hessian(H, 0.01, order_by_diagonal(H))
    assert result.dead == 2
    place = {int(column): at for at, column in enumerate(result.order)}
    row = result.U[place[3]]
    assert row[row != 0].numel() == 1  # nothing is pushed from a dead column onto others


def test_an_input_that_is_zero_everywhere_still_factorises() -> None:
    result = damp_hessian(torch.zeros(16, 16), 0.01, torch.arange(16))
    assert result.dead == 16
    assert result.U.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_an_error(bad: float) -> None:
    H = problem(0).H
    H[5, 5] = bad
    with pytest.raises(QuantisationError, match="NaN or Inf"):
        damp_hessian(H, 0.01, NATURAL)


def test_a_matrix_that_no_damping_makes_positive_definite_is_an_error() -> None:
    H = torch.diag(torch.full((64,), 1.0))
    H[0, 1] = H[1, 0] = 1e30
    with pytest.raises(QuantisationError, match="not positive definite"):
        damp_hessian(H, 0.01, NATURAL)
