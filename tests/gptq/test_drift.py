from __future__ import annotations

import pytest
import torch
from problems import problem

from qwenq.distributed import ALONE, Team
from qwenq.gptq.damping import damped
from qwenq.gptq.drift import drift, drifted_target, times_inverse
from qwenq.gptq.solver import act_order


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Drifted inputs and the original ones, [tokens, in] float64."""
    x = problem(seed, dtype=torch.float64).X
    return x, x + 0.3 * problem(seed + 1, dtype=torch.float64).X @ torch.eye(64, dtype=torch.float64).roll(
        1, 0
    )


@pytest.mark.parametrize("team", [ALONE, Team(launched=True)])
def test_the_matrix_is_the_mean_product_of_drift_and_input_however_it_is_split(team: Team) -> None:
    x, original = inputs()
    expected = 2 / x.shape[0] * (original - x).T @ x
    for parts in (1, 3, 7):
        C = drift(x.float().chunk(parts), original.float().chunk(parts), 64, "cpu", team)
        assert C is not None
        assert C.dtype is torch.float32
        torch.testing.assert_close(C.double(), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_are_multiplied_in_float32() -> None:
    x, original = (t.bfloat16() for t in inputs())
    expected = 2 / x.shape[0] * (original.double() - x.double()).T @ x.double()
    C = drift(x.chunk(4), original.chunk(4), 64, "cpu")
    assert C is not None
    assert C.dtype is torch.float32
    torch.testing.assert_close(C.double(), expected, rtol=1e-4, atol=1e-5)


def test_float16_products_do_not_overflow() -> None:
    x = torch.full((16, 8), 3e4, dtype=torch.float16)
    C = drift([x], [x / 2], 8, "cpu")
    assert C is not None
    assert C.isfinite().all()


def test_references_for_the_first_batches_only() -> None:
    x, original = inputs()
    some = drift(x.float().chunk(4), original.float().chunk(4)[:1], 64, "cpu")
    whole = drift(x.float().chunk(4)[:1], original.float().chunk(4)[:1], 64, "cpu")
    assert some is not None
    assert whole is not None
    assert torch.equal(some, whole)
    assert drift(x.float().chunk(4), [], 64, "cpu") is None


@pytest.mark.parametrize("reorder", [False, True])
def test_the_target_is_the_regression_of_the_original_outputs(reorder: bool) -> None:
    """Against float64 least squares of W x̃ on x, with the same damping as a ridge towards W."""
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W
    H = 2 / x.shape[0] * x.T @ x
    hessian = damped(H.clone(), 0.01, act_order(H) if reorder else torch.arange(64))
    C = 2 / x.shape[0] * (original - x).T @ x
    got = drifted_target(W, C, hessian, 1.0)
    torch.testing.assert_close(got, drifted_target(W, C, hessian, 1.0, times_inverse(C, hessian)))
    ridge = 0.01 * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    wanted = torch.linalg.solve(H + ridge, (W @ C).T).T + W
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    before = ((x @ W.T) - original @ W.T).square().sum()
    assert ((x @ got.T) - original @ W.T).square().sum() < 0.9 * before


def test_no_strength_and_no_drift_leave_the_weight_alone() -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W
    hessian = damped(2 / x.shape[0] * x.T @ x, 0.01, torch.arange(64))
    C = 2 / x.shape[0] * (original - x).T @ x
    assert torch.equal(drifted_target(W, C, hessian, 0.0), W)
    assert torch.equal(drifted_target(W, torch.zeros_like(C), hessian, 1.0), W)
