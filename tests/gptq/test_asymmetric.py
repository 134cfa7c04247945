from __future__ import annotations

import pytest
import torch
from problems import problem

from qwenq.distributed import ALONE, Team
from qwenq.gptq.asymmetric import Deviation, measure_deviation, shift_targets, times_inverse
from qwenq.gptq.hessian import exact_deviation, running_deviation, running_hessian, running_output_deviation
from qwenq.gptq.solver import PANEL, damp_hessian, order_by_diagonal


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Drifted inputs and the original ones, [tokens, in] float64."""
    x = problem(seed, dtype=torch.float64).X
    return x, x + 0.3 * problem(seed + 1, dtype=torch.float64).X @ torch.eye(64, dtype=torch.float64).roll(
        1, 0
    )


def mean_deviation(x: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """C as its formula says."""
    return 2 / x.shape[0] * (original - x).T @ x


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_the_deviation_is_its_formula_however_tokens_are_split(parts: int) -> None:
    x, original = inputs()
    given, references = x.float().chunk(parts), original.float().chunk(parts)
    for C in (
        running_deviation(given, references, running_hessian(given)),
        exact_deviation(given, references, 64, "cpu", Team(launched=True)),
    ):
        assert C is not None
        assert C.dtype is torch.float32
        torch.testing.assert_close(C.double(), mean_deviation(x, original), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_output_deviation_is_the_weight_times_the_deviation(parts: int) -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W[:24]
    WC = running_output_deviation(x.float().chunk(parts), original.float().chunk(parts), W.float())
    assert WC is not None
    assert WC.dtype is torch.float32
    torch.testing.assert_close(WC.double(), W @ mean_deviation(x, original), rtol=1e-4, atol=1e-4)


def test_bfloat16_output_deviation_changes_the_shift_by_less_than_four_thousandths() -> None:
    x, original = (t.bfloat16() for t in inputs())
    W = problem(0, dtype=torch.float64).W[:24]
    hessian = damp_hessian(2 / x.shape[0] * x.double().T @ x.double(), 0.01, torch.arange(64))
    C = mean_deviation(x.double(), original.double())
    (wanted,) = Deviation(C, False).target_shifts(W, [slice(None)], hessian)
    WC = running_output_deviation(x.chunk(4), original.chunk(4), W.float())
    assert WC is not None
    (got,) = Deviation(WC.double(), True).target_shifts(W, [slice(None)], hessian)
    assert float((got - wanted).norm() / wanted.norm()) < 4e-3


def test_bfloat16_activations_are_multiplied_in_float32() -> None:
    x, original = (t.bfloat16() for t in inputs())
    C = running_deviation(x.chunk(4), original.chunk(4), running_hessian(x.chunk(4)))
    assert C is not None
    assert C.dtype is torch.float32
    torch.testing.assert_close(
        C.double(), mean_deviation(x.double(), original.double()), rtol=1e-4, atol=1e-5
    )


def test_float16_products_do_not_overflow() -> None:
    x = torch.full((16, 8), 3e4, dtype=torch.float16)
    C = running_deviation([x], [x / 2], running_hessian([x]))
    assert C is not None
    assert C.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_inputs_have_exactly_no_deviation(dtype: torch.dtype) -> None:
    """Not by the rounding of sums either, which H⁻¹ would enlarge."""
    x = inputs()[0].to(dtype).chunk(3)
    C = running_deviation(x, [part.clone() for part in x], running_hessian(x))
    assert C is not None
    assert not C.any()


@pytest.mark.parametrize("team", [ALONE, Team(launched=True)])
def test_few_rows_sum_output_deviations_and_many_input_deviations(team: Team) -> None:
    x, original = (t.float() for t in inputs())
    W, H = problem(0).W.float(), running_hessian([x])
    few = measure_deviation([x], [original], [W[:10], W[10:20]], H, team)
    many = measure_deviation([x], [original], [W, W, W, W], H, team)
    assert few is not None and few.times_weight != team.launched
    assert many is not None and not many.times_weight
    assert measure_deviation([x], [], [W[:20]], H, team) is None
    assert measure_deviation([x], [], [W, W, W, W], H, team) is None


@pytest.mark.parametrize("rows", [24, 64, 100])
@pytest.mark.parametrize("reorder", [False, True])
def test_the_target_is_the_regression_of_the_original_outputs(reorder: bool, rows: int) -> None:
    """Against float64 least squares of W x̃ on x, with the same damping as a ridge towards W."""
    x, original = inputs()
    W = torch.cat([problem(seed, dtype=torch.float64).W for seed in range(6)])[:rows]
    assert W.shape[0] == rows
    H = 2 / x.shape[0] * x.T @ x
    hessian = damp_hessian(H.clone(), 0.01, order_by_diagonal(H) if reorder else torch.arange(64))
    C = mean_deviation(x, original)
    ridge = 0.01 * H.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    wanted = torch.linalg.solve(H + ridge, (W @ C).T).T + W
    parts = [slice(0, 10), slice(10, rows)]
    for found in (Deviation(C, False), Deviation(W @ C, True)):
        got = W.clone()
        shift_targets(got, parts, found, hessian, 1.0)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    before = ((x @ W.T) - original @ W.T).square().sum()
    assert ((x @ wanted.T) - original @ W.T).square().sum() < 0.9 * before


@pytest.mark.parametrize("width", [1, 64, 192, 193, 700])
@pytest.mark.parametrize("reorder", [False, True])
def test_times_inverse_reads_only_the_upper_triangle(width: int, reorder: bool) -> None:
    """Over several panels, against the whole products, whatever lies below U's diagonal."""
    given = problem(0, rows=5, width=width, tokens=2 * width, dtype=torch.float64)
    order = order_by_diagonal(given.H) if reorder else torch.arange(width)
    hessian = damp_hessian(given.H.clone(), 0.01, order)
    whole = torch.empty_like(given.W)
    whole[:, order] = given.W[:, order] @ hessian.U.T @ hessian.U
    torch.testing.assert_close(times_inverse(given.W, hessian), whole, rtol=1e-9, atol=1e-9)
    hessian.U.add_(torch.full_like(hessian.U, torch.nan).tril(-PANEL))
    assert times_inverse(given.W, hessian).isfinite().all()


def test_zero_strength_or_deviation_leaves_the_weight() -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W
    hessian = damp_hessian(2 / x.shape[0] * x.T @ x, 0.01, torch.arange(64))
    C = mean_deviation(x, original)
    for found, strength in ((Deviation(C, False), 0.0), (Deviation(torch.zeros_like(C), False), 1.0)):
        shifted = W.clone()
        shift_targets(shifted, [slice(None)], found, hessian, strength)
        assert torch.equal(shifted, W)


def test_the_deviation_of_another_weight_is_refused() -> None:
    x, original = inputs()
    W = problem(0, dtype=torch.float64).W
    hessian = damp_hessian(2 / x.shape[0] * x.T @ x, 0.01, torch.arange(64))
    with pytest.raises(ValueError, match="and W"):
        shift_targets(W, [slice(None)], Deviation((W @ mean_deviation(x, original))[:8], True), hessian, 1.0)
