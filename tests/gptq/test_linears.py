from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import problem, usual

from qwenq.compute.grid import Rounded
from qwenq.errors import QuantisationError
from qwenq.gptq import linears, solver
from qwenq.gptq.linears import quantise_group

USUAL = usual()


def layer(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    given = problem(seed, rows=48)
    return {"q": given.W[:32].clone(), "k": given.W[32:].clone()}, given.H, given.X


def energy(W: torch.Tensor, X: torch.Tensor) -> float:
    """‖W X‖² a token, with the share that damping adds."""
    tokens = X.shape[0]
    mean = X.square().sum(0).mean() / tokens
    return float((X @ W.T).square().sum() / tokens + USUAL.damp * mean * W.square().sum())


@pytest.mark.parametrize("changes", [
    {}, {"bits": 8}, {"sym": False}, {"act_order": False}, {"coordinate_descent": False}, {"group_size": -1},
    {"scale_search": "none"}, {"scale_search": "mse", "coordinate_descent": False},
])  # fmt: skip
def test_every_module_is_better_than_rounding_to_nearest(changes: dict[str, object]) -> None:
    weights, H, X = layer()
    settings = replace(USUAL, **changes)
    results = quantise_group(weights, H.clone(), None, settings)
    assert list(results) == ["q", "k"]
    for name, result in results.items():
        W, Q = weights[name], result.grid.values(result.integers)
        assert result.integers.shape == W.shape
        assert result.stats.error < result.stats.rtn_error
        assert result.stats.error == pytest.approx(energy(W - Q, X) / energy(W, X), rel=1e-3)


def test_linears_of_a_group_get_what_they_get_alone() -> None:
    weights, H, _ = layer()
    together = quantise_group(weights, H.clone(), None, USUAL)
    for name, weight in weights.items():
        alone = quantise_group({name: weight}, H.clone(), None, USUAL)[name]
        assert (alone.integers == together[name].integers).float().mean() > 0.99
        torch.testing.assert_close(alone.grid.scales, together[name].grid.scales, rtol=2e-2, atol=0)


def test_dead_columns_are_rounded_to_nearest_and_counted() -> None:
    weights, _, X = layer()
    X[:, 7] = 0
    H = 2 / X.shape[0] * X.T @ X
    for result in quantise_group(weights, H, None, replace(USUAL, coordinate_descent=False)).values():
        assert result.stats.dead == 1
    results = quantise_group(
        weights, 2 / X.shape[0] * X.T @ X, None, replace(USUAL, coordinate_descent=False)
    )
    q = results["q"]
    assert torch.equal(q.integers[:, 7].float(), q.grid.integers(weights["q"])[:, 7])


def test_a_module_worse_than_rounding_to_nearest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the solver to return rubbish for one linear of a group, that one is named."""
    solve = solver.gptq

    def rubbish(W: torch.Tensor, *rest: object) -> Rounded:
        rounded = solve(W, *rest)  # type: ignore[arg-type]
        rounded.integers[32:] = 15 - rounded.integers[32:]
        return rounded

    monkeypatch.setattr(solver, "gptq", rubbish)
    weights, H, _ = layer()
    with pytest.raises(QuantisationError, match="above round-to-nearest's") as caught:
        quantise_group(weights, H, None, replace(USUAL, coordinate_descent=False))
    assert caught.value.where == "k"
    assert caught.value.hint


def test_a_nan_error_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(W: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.full((W.shape[0],), torch.nan)

    monkeypatch.setattr(linears, "output_error", nothing)
    weights, H, _ = layer()
    with pytest.raises(QuantisationError, match="nan"):
        quantise_group(weights, H, None, USUAL)


def test_a_weight_of_zeros_has_no_error() -> None:
    _, H, _ = layer()
    result = quantise_group({"zero": torch.zeros(8, 64)}, H, None, USUAL)["zero"]
    assert result.stats.error == 0
    assert (result.grid.values(result.integers) == 0).all()


def test_group_size_minus_one_gives_one_scale_a_row() -> None:
    weights, H, _ = layer()
    result = quantise_group(weights, H, None, replace(USUAL, group_size=-1))["q"]
    assert result.grid.scales.shape == (32, 1)
    assert result.grid.group_size == 64
