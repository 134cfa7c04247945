from __future__ import annotations

import pytest
import torch
from problems import problem

from qwenq.distributed import ALONE, Team
from qwenq.gptq.damping import damped
from qwenq.gptq.drift import InputDrift, OutputDrift, aim, drift, exact_drift, times_inverse
from qwenq.gptq.running import running_drift, running_hessian, running_output_drift
from qwenq.gptq.solver import PANEL, act_order


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Drifted inputs and the original ones, [tokens, in] float64."""
    x = problem(seed, dtype=torch.float64).X
    return x, x + 0.3 * problem(seed + 1, dtype=torch.float64).X @ torch.eye(64, dtype=torch.float64).roll(
        1, 0
    )


def mean_drift(x: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """C as its formula says."""
    return 2 / x.shape[0] * (original - x).T @ x


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_the_matrix_is_the_mean_product_of_drift_and_input_however_it_is_split(parts: int) -> None:
    x, original = inputs()
    given, references = x.float().chunk(parts), original.float().chunk(parts)
    for C in (
        running_drift(given, references, running_hessian(given)),
        exact_drift(given, references, 64, "cpu", Team(launched=True)),
    ):
        assert C is not None
        assert C.dtype is torch.float32
        torch.testing.assert_close(C.double(), mean_drift(x, original), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_few_rows_see_the_same_drift_through_their_outputs(parts: int) -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W[:24]
    WC = running_output_drift(x.float().chunk(parts), original.float().chunk(parts), W.float())
    assert WC is not None
    assert WC.dtype is torch.float32
    torch.testing.assert_close(WC.double(), W @ mean_drift(x, original), rtol=1e-4, atol=1e-4)


def test_rounding_a_tokens_drift_to_bfloat16_costs_a_thousandth_of_the_correction() -> None:
    x, original = (t.bfloat16() for t in inputs())
    W = problem(0, dtype=torch.float64).W[:24]
    hessian = damped(2 / x.shape[0] * x.double().T @ x.double(), 0.01, torch.arange(64))
    C = mean_drift(x.double(), original.double())
    (wanted,) = InputDrift(C).corrections(W, [slice(None)], hessian)
    WC = running_output_drift(x.chunk(4), original.chunk(4), W.float())
    assert WC is not None
    (got,) = OutputDrift(WC.double()).corrections(W, [slice(None)], hessian)
    assert float((got - wanted).norm() / wanted.norm()) < 4e-3


def test_bfloat16_activations_are_multiplied_in_float32() -> None:
    x, original = (t.bfloat16() for t in inputs())
    C = running_drift(x.chunk(4), original.chunk(4), running_hessian(x.chunk(4)))
    assert C is not None
    assert C.dtype is torch.float32
    torch.testing.assert_close(C.double(), mean_drift(x.double(), original.double()), rtol=1e-4, atol=1e-5)


def test_float16_products_do_not_overflow() -> None:
    x = torch.full((16, 8), 3e4, dtype=torch.float16)
    C = running_drift([x], [x / 2], running_hessian([x]))
    assert C is not None
    assert C.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_has_not_drifted_is_not_corrected(dtype: torch.dtype) -> None:
    """Not by the rounding of sums either, which H⁻¹ would enlarge."""
    x = inputs()[0].to(dtype).chunk(3)
    C = running_drift(x, [part.clone() for part in x], running_hessian(x))
    assert C is not None
    assert not C.any()


@pytest.mark.parametrize("team", [ALONE, Team(launched=True)])
def test_what_is_summed_depends_on_the_shape_of_the_weights(team: Team) -> None:
    x, original = (t.float() for t in inputs())
    W, H = problem(0).W.float(), running_hessian([x])
    few = drift([x], [original], [W[:10], W[10:20]], H, team)
    many = drift([x], [original], [W, W, W, W], H, team)
    assert isinstance(few, InputDrift if team.launched else OutputDrift)
    assert isinstance(many, InputDrift)
    assert drift([x], [], [W[:20]], H, team) is None
    assert drift([x], [], [W, W, W, W], H, team) is None


@pytest.mark.parametrize("rows", [24, 64, 100])
@pytest.mark.parametrize("reorder", [False, True])
def test_the_target_is_the_regression_of_the_original_outputs(reorder: bool, rows: int) -> None:
    """Against float64 least squares of W x̃ on x, with the same damping as a ridge towards W."""
    x, original = inputs()
    W = torch.cat([problem(seed, dtype=torch.float64).W for seed in range(6)])[:rows]
    assert W.shape[0] == rows
    H = 2 / x.shape[0] * x.T @ x
    hessian = damped(H.clone(), 0.01, act_order(H) if reorder else torch.arange(64))
    C = mean_drift(x, original)
    ridge = 0.01 * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    wanted = torch.linalg.solve(H + ridge, (W @ C).T).T + W
    parts = [slice(0, 10), slice(10, rows)]
    for found in (InputDrift(C), OutputDrift(W @ C)):
        got = W.clone()
        aim(got, parts, found, hessian, 1.0)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    before = ((x @ W.T) - original @ W.T).square().sum()
    assert ((x @ wanted.T) - original @ W.T).square().sum() < 0.9 * before


@pytest.mark.parametrize("width", [1, 64, 192, 193, 700])
@pytest.mark.parametrize("reorder", [False, True])
def test_half_a_triangle_is_all_of_it(width: int, reorder: bool) -> None:
    """Over several panels, against the whole products, whatever lies below U's diagonal."""
    given = problem(0, rows=5, width=width, tokens=2 * width, dtype=torch.float64)
    order = act_order(given.H) if reorder else torch.arange(width)
    hessian = damped(given.H.clone(), 0.01, order)
    whole = torch.empty_like(given.W)
    whole[:, order] = given.W[:, order] @ hessian.U.T @ hessian.U
    torch.testing.assert_close(times_inverse(given.W, hessian), whole, rtol=1e-9, atol=1e-9)
    hessian.U.add_(torch.full_like(hessian.U, torch.nan).tril(-PANEL))
    assert times_inverse(given.W, hessian).isfinite().all()


def test_no_strength_and_no_drift_leave_the_weight_alone() -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W
    hessian = damped(2 / x.shape[0] * x.T @ x, 0.01, torch.arange(64))
    C = mean_drift(x, original)
    for found, strength in ((InputDrift(C), 0.0), (InputDrift(torch.zeros_like(C)), 1.0)):
        aimed = W.clone()
        aim(aimed, [slice(None)], found, hessian, strength)
        assert torch.equal(aimed, W)


def test_another_weights_drift_is_refused() -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W
    hessian = damped(2 / x.shape[0] * x.T @ x, 0.01, torch.arange(64))
    with pytest.raises(ValueError, match="not"):
        aim(W, [slice(None)], OutputDrift((W @ mean_drift(x, original))[:8]), hessian, 1.0)
