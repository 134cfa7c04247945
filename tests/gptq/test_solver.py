from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import algorithm_1
from problems import Problem, problem

from qwenq.compute.grid import Grid, search_grid
from qwenq.errors import UsageError
from qwenq.gptq.solver import gptq, inverse_factor, order_by_diagonal, output_error, quantize_weight


def damp(H: torch.Tensor, share: float = 0.01) -> torch.Tensor:
    return H + share * H.diagonal().mean() * torch.eye(H.shape[0], dtype=H.dtype)


def both(
    given: Problem, H: torch.Tensor, grid: Grid, *, reorder: bool, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Our integers, the oracle's, the values that it rounded, and the order."""
    order = order_by_diagonal(H) if reorder else torch.arange(H.shape[0])
    U = inverse_factor(H[order][:, order])
    assert U is not None
    fast = gptq(given.W, U, grid, order, block).integers
    slow, rounded = algorithm_1(given.W, H, grid.scales, grid.zeros, grid.bits, order, block)
    return fast, slow, rounded, order


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(4, 32, True), (4, 64, False), (8, 192, True)])
def test_the_fast_solver_is_algorithm_1_in_float64(
    seed: int, reorder: bool, bits: int, group_size: int, sym: bool
) -> None:
    given = problem(seed, width=192, dtype=torch.float64)
    grid = search_grid(
        given.W.float(), given.H.diagonal().float(), bits, group_size, sym=sym, search="hessian"
    )
    fast, slow, _, _ = both(given, damp(given.H), grid, reorder=reorder, block=128)
    assert fast.dtype is torch.uint8
    assert torch.equal(fast.double(), slow)


@pytest.mark.parametrize("reorder", [False, True])
def test_in_float32_every_decision_that_is_no_tie_agrees(reorder: bool) -> None:
    """Sums in another order may break a tie differently, and with it the rest of that row; nothing else."""
    equal = 0
    for seed in range(40):
        given = problem(seed, rows=16, width=96)
        grid = search_grid(given.W, given.H.diagonal(), 4, 32, sym=True, search="hessian")
        fast, slow, rounded, order = both(given, damp(given.H), grid, reorder=reorder, block=32)
        different = (fast.float() != slow)[:, order]  # in the order of rounding
        equal += not bool(different.any())
        for row in different.any(1).nonzero().flatten().tolist():
            first = int(order[int(different[row].nonzero()[0])])
            from_tie = abs(float(rounded[row, first]) % 1 - 0.5)
            assert from_tie < 1e-3, f"seed {seed}, row {row}, column {first}"
    assert equal >= 36


@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_gptq_is_the_same_in_blocks_of_any_size(block: int) -> None:
    given = problem(3, width=192, dtype=torch.float64)
    grid = search_grid(given.W.float(), given.H.diagonal().float(), 4, 64, sym=True, search="none")
    fast, slow, _, _ = both(given, damp(given.H), grid, reorder=True, block=block)
    usual, *_ = both(given, damp(given.H), grid, reorder=True, block=128)
    assert torch.equal(fast, usual)
    assert torch.equal(fast.double(), slow)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_gptqs_own_errors_are_the_output_errors(dtype: torch.dtype, rtol: float) -> None:
    given = problem(4, width=192, dtype=dtype)
    H = damp(given.H)
    grid = search_grid(given.W.float(), H.diagonal().float(), 4, 64, sym=True, search="hessian")
    order = order_by_diagonal(H)
    U = inverse_factor(H, order)
    rounded = gptq(given.W, U, grid, order)
    exact = output_error(given.W, grid.values(rounded.integers).to(dtype), H)
    torch.testing.assert_close(rounded.errors, exact, rtol=rtol, atol=0)


def test_gptq_without_an_order_rounds_in_natural_order() -> None:
    given = problem(5)
    grid = search_grid(given.W, given.H.diagonal(), 4, 32, sym=True, search="none")
    U = inverse_factor(damp(given.H))
    natural = gptq(given.W, U, grid, torch.arange(64)).integers
    assert torch.equal(gptq(given.W, U, grid).integers, natural)


def test_gptq_with_uncorrelated_inputs_rounds_to_nearest() -> None:
    given = problem(1)
    grid = search_grid(given.W, torch.ones(64), 4, 32, sym=True, search="none")
    U = inverse_factor(torch.eye(64) * 3)
    assert torch.equal(gptq(given.W, U, grid).integers.float(), grid.integers(given.W))


def test_gptq_beats_rounding_to_nearest_on_correlated_inputs() -> None:
    given = problem(1)
    H = damp(given.H)
    grid = search_grid(given.W, H.diagonal(), 4, 32, sym=True, search="none")
    U = inverse_factor(H)
    solved = output_error(given.W, grid.values(gptq(given.W, U, grid).integers), H).sum()
    nearest = output_error(given.W, grid.values(grid.integers(given.W)), H).sum()
    assert solved < 0.7 * nearest


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 48))
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse(seed: int, width: int) -> None:
    H = damp(problem(seed, width=width, tokens=64, dtype=torch.float64).H)
    U = inverse_factor(H)
    assert U is not None
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    torch.testing.assert_close(U.T @ U @ H, torch.eye(width, dtype=torch.float64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("width", [1, 191, 192, 193, 255, 256, 257, 700])
def test_the_factor_of_a_reordered_matrix_over_several_panels(width: int) -> None:
    H = damp(problem(2, width=width, tokens=900, dtype=torch.float64).H)
    order = order_by_diagonal(H)
    U = inverse_factor(H, order)
    assert U is not None
    expected = inverse_factor(H[order][:, order])
    assert torch.equal(U, expected)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H[order][:, order]), rtol=1e-7, atol=1e-9)


def test_a_matrix_that_is_not_positive_definite_has_no_factor() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0, 2.0]))
    assert inverse_factor(H) is None


def test_an_inverse_that_overflows_is_a_failure_too() -> None:
    H = torch.diag(torch.tensor([1e-42, 1.0], dtype=torch.float32)) ** 2 + torch.diag(
        torch.tensor([1e-45, 0.0])
    )
    U = inverse_factor(H)
    assert U is None or bool(U.isfinite().all())


def test_the_costliest_columns_come_first_and_ties_keep_their_order() -> None:
    H = torch.diag(torch.tensor([1.0, 5.0, 1.0, 7.0, 5.0]))
    assert order_by_diagonal(H).tolist() == [3, 1, 4, 0, 2]


def test_output_error_is_the_mean_squared_change_of_the_output() -> None:
    given = problem(2, dtype=torch.float64)
    Q = given.W + 0.01 * torch.randn_like(given.W)
    change = (given.X @ (given.W - Q).T).square().mean(0)  # [rows]
    torch.testing.assert_close(output_error(given.W, Q, given.H), change)


@pytest.mark.parametrize("width", [1, 191, 192, 193, 255, 256, 257, 700])
def test_output_error_over_several_panels(width: int) -> None:
    given = problem(3, rows=7, width=width, dtype=torch.float64)
    D = 0.01 * torch.randn_like(given.W)
    torch.testing.assert_close(
        output_error(given.W, given.W + D, given.H), (D @ given.H * D).sum(1) / 2, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", ["static", "none"])
def test_quantize_weight_beats_rounding_and_returns_its_error(
    bits: int, sym: bool, act_order: Literal["static", "none"]
) -> None:
    given = problem(8)
    weight, hessian = given.W.clone(), given.H.clone()
    result = quantize_weight(weight, hessian, bits=bits, group_size=32, sym=sym, act_order=act_order)
    assert torch.equal(weight, given.W)
    assert torch.equal(hessian, given.H)
    assert int(result.integers.max()) < 2**bits
    grid = Grid(bits, 32, result.scales, result.zeros)
    assert torch.equal(result.dequantized, grid.values(result.integers))
    damped, W, D = damp(given.H, 0.1).double(), given.W.double(), (given.W - result.dequantized).double()
    assert result.error == pytest.approx(float((D @ damped * D).sum() / (W @ damped * W).sum()), rel=1e-3)
    assert result.error < result.rtn_error
    assert result.damp == 0.1


def test_quantize_weight_takes_half_precision_one_group_a_row_and_a_scaled_hessian() -> None:
    given = problem(9)
    one, other = (
        quantize_weight(given.W.bfloat16(), factor * given.H, group_size=-1, coordinate_descent=False)
        for factor in (1.0, 1024.0)
    )
    assert one.scales.shape == (24, 1)
    assert torch.equal(one.integers, other.integers)
    assert one.error == pytest.approx(other.error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 48}, "a group size that divides 64, not 48"),
        ({"bits": 16}, "2 to 8 bits, not 16"),
        ({"hessian": torch.eye(32)}, r"a Hessian \[64, 64\], not \[32, 32\]"),
        ({"weight": torch.ones(64)}, r"a weight \[out, in\], not \[64\]"),
        ({"damp": 0.0}, "damp above 0"),
        ({"act_order": True}, "act_order"),
        ({"scale_search": "best"}, "not 'best'"),
    ],
)
def test_quantize_weight_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    given = problem(0)
    with pytest.raises(UsageError, match=message):
        quantize_weight(**{"weight": given.W, "hessian": given.H, "group_size": 32, **changes})
