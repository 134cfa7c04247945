from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.compute.columns import storable
from qwenq.compute.grid import Grid, round_to_nearest


def grid(bits: int = 4, scale: float = 0.1, zero: float = 8.0, groups: int = 2, rows: int = 3) -> Grid:
    return Grid(bits, 8, torch.full((rows, groups), scale), torch.full((rows, groups), zero))


def test_integers_are_the_nearest_on_the_grid() -> None:
    g = grid()
    W = torch.randn(3, 16) * 0.3
    every = torch.arange(16) - 8
    nearest = (W[..., None] - every * 0.1).abs().min(-1).values  # [rows, in]
    torch.testing.assert_close((W - g.values(g.integers(W))).abs(), nearest)


def test_a_negative_scale_turns_the_grid_around() -> None:
    W = torch.tensor([[0.8] + [-0.7] * 7])
    turned = Grid(4, 8, torch.tensor([[-0.1]]), torch.tensor([[8.0]]))
    assert turned.integers(W).tolist() == [[0.0] + [15.0] * 7]
    torch.testing.assert_close(turned.values(turned.integers(W)), W)


def test_groups_are_runs_of_columns() -> None:
    scales = torch.tensor([[0.1, 1.0]])
    g = Grid(4, 8, scales, torch.full((1, 2), 8.0))
    assert g.values(torch.full((1, 16), 9)).tolist()[0] == [scales[0, 0].item()] * 8 + [1.0] * 8


@settings(max_examples=200)
@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=20))
def test_storable_scales_survive_float16_and_are_never_zero(values: list[float]) -> None:
    scales = torch.tensor(values)
    stored = storable(scales)
    assert torch.equal(stored.half().float(), stored)
    assert (stored != 0).all()
    assert stored.isfinite().all()
    assert ((stored < 0) == (scales < 0)).all()
    usual = (scales.abs() > 1e-4) & (scales.abs() < 6e4)
    torch.testing.assert_close(stored[usual], scales[usual], rtol=2**-11, atol=0)


def test_values_are_rounded_to_the_nearest_even_as_the_solver_does() -> None:
    g = grid(scale=1.0, groups=1, rows=1)
    W = torch.tensor([[0.5, 1.5, -0.5, -1.5, 2.5, -100.0, 100.0, 0.0]])
    assert g.integers(W).tolist() == [[8, 10, 8, 6, 10, 0, 15, 8]]


def test_a_short_last_group_is_rounded_like_others() -> None:
    W = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    whole = round_to_nearest(W, 4, 32, sym=True)
    assert torch.equal(whole[:, :32], round_to_nearest(W[:, :32], 4, 32, sym=True))
    assert torch.equal(whole[:, 32:], round_to_nearest(W[:, 32:], 4, -1, sym=True))
