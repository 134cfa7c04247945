from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.compute.grid import Grid, ScaleSearch, search_grid
from qwenq.compute.scales import CHUNK, MSE_POWER

SUMMATION = 1 + 1e-5  # the search sums in another order


def weights(seed: int, rows: int = 8, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=draw) * 0.02
    W[:, ::17] *= 4  # outliers: where a search pays
    return W, torch.rand(width, generator=draw).square() + 1e-3


def cost(W: torch.Tensor, h: torch.Tensor, grid: Grid, power: float) -> torch.Tensor:
    """Per row and group."""
    gap = (W - grid.values(grid.integers(W))).abs().pow(power) * h
    return gap.reshape(W.shape[0], -1, grid.group_size).sum(2)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([8, 32, 64]),
    sym=st.booleans(),
    search=st.sampled_from(["hessian", "mse"]),
)
def test_a_search_is_never_worse_than_none_by_its_own_objective(
    seed: int, bits: int, size: int, sym: bool, search: ScaleSearch
) -> None:
    W, importance = weights(seed)
    h, power = (importance, 2.0) if search == "hessian" else (torch.ones(64), MSE_POWER)
    found = cost(W, h, search_grid(W, importance, bits, size, sym=sym, search=search), power)
    plain = cost(W, h, search_grid(W, importance, bits, size, sym=sym, search="none"), power)
    assert (found <= plain * SUMMATION + 1e-15).all()


def test_search_and_weighting_lower_the_error_on_uneven_inputs() -> None:
    W, importance = weights(0, rows=64)
    costs = {
        search: float(
            cost(W, importance, search_grid(W, importance, 4, 64, sym=True, search=search), 2).sum()
        )
        for search in ("none", "mse", "hessian")
    }
    assert costs["hessian"] < costs["mse"] < costs["none"]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 4, 8]),
    sym=st.booleans(),
    search=st.sampled_from(["hessian", "mse", "none"]),
    shift=st.floats(-0.2, 0.2),
)
def test_searched_scales_and_zeros_can_be_stored(
    seed: int, bits: int, sym: bool, search: ScaleSearch, shift: float
) -> None:
    W, importance = weights(seed)
    W = W + shift
    grid = search_grid(W, importance, bits, 32, sym=sym, search=search)
    assert grid.scales.shape == grid.zeros.shape == (8, 2)
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert (grid.scales != 0).all()
    assert torch.equal(grid.zeros, grid.zeros.round())
    if sym:
        assert (grid.zeros == 1 << (bits - 1)).all()
    else:
        assert grid.zeros.min() >= 1  # stored minus one: 0 has no safe form
        assert grid.zeros.max() <= (1 << bits) - 1


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("search", ["hessian", "mse", "none"])
def test_a_group_of_zeros_stays_zero(sym: bool, search: ScaleSearch) -> None:
    W, importance = weights(1)
    W[2, 32:] = 0
    W[3] = 0
    grid = search_grid(W, importance, 4, 32, sym=sym, search=search)
    back = grid.values(grid.integers(W))
    assert back.isfinite().all()
    assert (back[2, 32:] == 0).all()
    assert (back[3] == 0).all()


def test_columns_without_importance_do_not_break_the_search() -> None:
    W, _ = weights(2)
    grid = search_grid(W, torch.zeros(64), 4, 32, sym=True, search="hessian")
    plain = search_grid(W, torch.zeros(64), 4, 32, sym=True, search="none")
    assert torch.equal(grid.scales, plain.scales)


def test_the_largest_weight_meets_the_longer_side_of_a_symmetric_grid() -> None:
    W = torch.tensor([[0.8, -0.1, 0.3, 0.0, 0.2, 0.1, 0.0, -0.7]])
    up = search_grid(W, torch.ones(8), 4, 8, sym=True, search="none")
    down = search_grid(-W, torch.ones(8), 4, 8, sym=True, search="none")
    assert up.scales.item() < 0 < down.scales.item()
    torch.testing.assert_close(up.values(up.integers(W)), -down.values(down.integers(-W)))
    assert up.integers(W)[0, 0] == 0  # 8 steps below the middle, times a negative scale: +0.8
    torch.testing.assert_close(up.values(up.integers(W))[0, 0], W[0, 0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_asymmetric_grid_spans_weights_of_one_sign(sign: int) -> None:
    W = sign * (torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) + 1)
    grid = search_grid(W, torch.ones(32), 8, 32, sym=False, search="hessian")
    step = grid.scales.abs().max()
    assert (W - grid.values(grid.integers(W))).abs().max() <= 1.01 * step


@pytest.mark.parametrize("search", ["hessian", "mse"])
def test_the_search_is_the_same_in_chunks_of_any_size(
    search: ScaleSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Groups of 8, which no compiled code takes.
    W, importance = weights(4, rows=33)
    whole = search_grid(W, importance, 4, 8, sym=True, search=search)
    monkeypatch.setitem(CHUNK, "cpu", 96)
    parts = search_grid(W, importance, 4, 8, sym=True, search=search)
    assert torch.equal(whole.scales, parts.scales)
