from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem

from qwenq.compute.grid import Grid, Rounded, search_grid
from qwenq.gptq.coordinate_descent import descend
from qwenq.gptq.solver import DampedHessian, damp_hessian, gptq, order_by_diagonal, output_error


def start(
    seed: int, bits: int, size: int, sym: bool, *, tokens: int = 256, nearest: bool = False
) -> tuple[torch.Tensor, DampedHessian, Grid, torch.Tensor]:
    given = problem(seed, tokens=tokens)
    hessian = damp_hessian(given.H, 0.01, order_by_diagonal(given.H))
    search = "none" if nearest else "hessian"
    grid = search_grid(given.W, hessian.H.diagonal(), bits, size, sym=sym, search=search)
    integers = (
        grid.integers(given.W).byte() if nearest else gptq(given.W, hessian.U, grid, hessian.order).integers
    )
    return given.W, hessian, grid, integers


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([8, 16, 64]),
    sym=st.booleans(),
    tokens=st.sampled_from([8, 256]),
    nearest=st.booleans(),
    block=st.sampled_from([5, 128]),
)
def test_coordinate_descent_makes_no_row_worse(
    seed: int, bits: int, size: int, sym: bool, tokens: int, nearest: bool, block: int
) -> None:
    W, hessian, grid, integers = start(seed, bits, size, sym, tokens=tokens, nearest=nearest)
    before = output_error(W, grid.values(integers), hessian.H)
    refined, rounded = descend(W, integers, grid, hessian.H, block=block)
    after = output_error(W, refined.values(rounded.integers), hessian.H)
    floor = 1e-6 * output_error(W, torch.zeros_like(W), hessian.H)  # sums are float32
    assert (after <= before + floor).all()
    torch.testing.assert_close(rounded.errors, after, rtol=1e-3, atol=float(floor.max()))
    assert rounded.integers.dtype is torch.uint8
    assert int(rounded.integers.max()) <= grid.levels
    assert torch.equal(refined.zeros, grid.zeros)
    assert torch.equal(refined.scales.half().float(), refined.scales)
    assert (refined.scales != 0).all()


def test_each_sweep_lowers_the_error_further_than_gptq() -> None:
    W, hessian, grid, integers = start(1, 4, 32, True)
    before = float(output_error(W, grid.values(integers), hessian.H).sum())
    once, twice = (
        float(descend(W, integers, grid, hessian.H, sweeps)[1].errors.sum()) / before for sweeps in (1, 2)
    )
    assert twice < once < 0.95
    assert twice < 0.92


def test_the_fitted_scale_is_the_best_of_ten_thousand() -> None:
    """One row, one group: the closed form against ten thousand scales."""
    W, hessian, grid, integers = start(7, 4, 64, True)
    W, integers = W[:1], integers[:1]
    grid = Grid(4, 64, grid.scales[:1] * 1.02, grid.zeros[:1])
    refined, rounded = descend(W, integers, grid, hessian.H, sweeps=1)
    many = torch.linspace(0.5, 1.5, 10_001)[:, None] * grid.scales
    costs = output_error(
        W.expand(10_001, -1),
        Grid(4, 64, many, grid.zeros.expand(10_001, 1)).values(rounded.integers.expand(10_001, -1)),
        hessian.H,
    )
    torch.testing.assert_close(refined.scales[0, 0], many[costs.argmin(), 0], rtol=1e-3, atol=0)


def test_coordinate_descent_ends_in_a_local_minimum() -> None:
    W, hessian, grid, integers = start(5, 4, 32, True, nearest=True)
    refined, rounded = descend(W, integers, grid, hessian.H, sweeps=60)
    best = output_error(W, refined.values(rounded.integers), hessian.H)
    for column in range(0, 64, 7):
        for step in (-1, 1):
            other = rounded.integers.int()
            other[:, column] = (other[:, column] + step).clamp(0, 15)
            assert (output_error(W, refined.values(other), hessian.H) >= best * (1 - 1e-3)).all()
    for group in range(2):
        for factor in (0.97, 1.03):
            scales = refined.scales.clone()
            scales[:, group] *= factor
            moved = Grid(4, 32, scales, grid.zeros).values(rounded.integers)
            assert (output_error(W, moved, hessian.H) >= best * (1 - 1e-3)).all()


def test_a_group_that_stays_all_zero_keeps_its_scale() -> None:
    W, hessian, grid, integers = start(2, 4, 32, True)
    W[3, 32:], integers[3, 32:] = 0, 8
    H = hessian.H.clone()
    H[32:, :32] = H[:32, 32:] = 0  # nothing of the other group can be made good here
    refined, rounded = descend(W, integers, grid, H)
    assert (rounded.integers[3, 32:] == 8).all()
    assert refined.scales[3, 1] == grid.scales[3, 1]


def test_coordinate_descent_in_float64() -> None:
    W, hessian, grid, integers = start(4, 4, 32, False)
    single, _ = descend(W, integers, grid, hessian.H)
    double, rounded = descend(W.double(), integers, grid, hessian.H.double())
    assert rounded.errors.dtype is torch.float64
    assert (single.scales != double.scales).float().mean() < 0.1


def agree(one: Rounded, other: Rounded) -> None:
    """Sums in another order break some ties otherwise, and what follows in the row with them."""
    assert (one.integers != other.integers).float().mean() < 0.04
    torch.testing.assert_close(one.errors.sum(), other.errors.sum(), rtol=5e-3, atol=0)


def test_coordinate_descent_is_the_same_in_blocks_of_any_size() -> None:
    W, hessian, grid, integers = start(4, 4, 64, False)
    usual, small = (descend(W, integers, grid, hessian.H, block=block)[1] for block in (128, 5))
    agree(usual, small)


@pytest.mark.parametrize("size", [16, 64])
def test_compiled_code_finds_what_torch_finds(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, hessian, grid, integers = start(9, 4, size, False)
    fast, by_fast = descend(W, integers, grid, hessian.H)
    monkeypatch.setenv("QWENQ_CPU", "torch")
    slow, by_slow = descend(W, integers, grid, hessian.H)
    assert (fast.scales != slow.scales).float().mean() < 0.05
    agree(by_fast, by_slow)
