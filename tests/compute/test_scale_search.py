"""The search for scales in compiled code, beside torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.compute import cpu
from qwenq.compute.grid import Grid, search_grid
from qwenq.compute.scales import Groups, search_by_c, search_by_torch, unsupported_reason

Found = tuple[torch.Tensor, torch.Tensor]

pytestmark = pytest.mark.usefixtures("each_variant")


def groups(seed: int, count: int, size: int, per_row: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [count, size] with outliers, and the importance of each column of a row."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(count, size, generator=draw) * 0.02
    W[:, ::17] *= 4
    return W, torch.rand(per_row * size, generator=draw).square() + 1e-3


def found_by_both(W: torch.Tensor, h: torch.Tensor, bits: int, *, sym: bool) -> tuple[Found, Found, Found]:
    """Scales and zeros, one of each to a group: of compiled code, of torch, and those of min/max."""
    start = search_grid(W, torch.ones(W.shape[1]), bits, W.shape[1], sym=sym, search="none")
    scales, zeros = start.scales.flatten(), start.zeros.flatten()
    fast, slow = (scales.clone(), zeros.clone()), (scales.clone(), zeros.clone())
    search_by_c(Groups(W, h, *fast, bits, sym))
    search_by_torch(Groups(W, h, *slow, bits, sym))
    return fast, slow, (scales, zeros)


def cost(W: torch.Tensor, h: torch.Tensor, found: Found, bits: int) -> torch.Tensor:
    """Of each group, added up in float64."""
    grid = Grid(bits, W.shape[1], *(x[:, None] for x in found))
    of_group = h.reshape(-1, W.shape[1]).repeat(len(W) * W.shape[1] // len(h), 1)
    return ((grid.values(grid.integers(W)) - W).double().square() * of_group).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [16, 64, 128, 576])
def test_c_and_torch_choose_the_same_scale_for_thousands_of_groups(bits: int, sym: bool, size: int) -> None:
    """Ties among them: added up in another order, one in a thousand finds another scale."""
    W, h = groups(bits, 4000, size)
    fast, slow, start = found_by_both(W, h, bits, sym=sym)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    assert cost(W, h, fast, bits).sum() < 0.99 * cost(W, h, start, bits).sum()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 9),
    per_row=st.integers(1, 3),
    size=st.sampled_from([16, 32, 48, 64, 576]),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    dead=st.booleans(),
)
def test_c_and_torch_choose_the_same_scales_for_any_shape(
    seed: int, count: int, per_row: int, size: int, bits: int, sym: bool, dead: bool
) -> None:
    W, h = groups(seed, count * per_row, size, per_row)
    h[: size * dead] = 0
    fast, slow, start = found_by_both(W, h, bits, sym=sym)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    assert (cost(W, h, fast, bits) <= cost(W, h, start, bits) * (1 + 1e-6)).all()
    assert torch.equal(fast[0].half().float(), fast[0])


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38, 1e-42, 0.0])
def test_c_and_torch_agree_on_nan_infinite_and_tiny_weights(bad: float, sym: bool) -> None:
    W, h = groups(0, 8, 32)
    W[2, 5] = bad
    W[3] = bad
    fast, slow, _ = found_by_both(W, h, 4, sym=sym)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_search_grid_runs_the_compiled_search() -> None:
    W, h = groups(5, 12, 32)
    grid = search_grid(W.view(3, 128), h, 4, 32, sym=False, search="hessian")
    fast, *_ = found_by_both(W, h, 4, sym=False)
    assert torch.equal(grid.scales.flatten(), fast[0])
    assert torch.equal(grid.zeros.flatten(), fast[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": torch.zeros(32, 8).T}, "not contiguous"),
        ({"weights": torch.zeros(8, 32, dtype=torch.float64)}, "float64"),
        ({"weights": torch.zeros(8, 24), "importance": torch.zeros(96)}, "8 groups of 24"),
        ({"importance": torch.zeros(96)}, "8 groups of 32 weights, and importance of 96"),
        ({"importance": torch.zeros(100)}, "importance of 100"),
        ({"scales": torch.zeros(7)}, "not contiguous torch.float32 .8."),
        ({"zeros": torch.zeros(8, dtype=torch.uint8)}, "uint8"),
    ],
)
def test_wrong_shapes_dtypes_and_strides_are_refused(changes: dict[str, torch.Tensor], message: str) -> None:
    W, h = groups(0, 8, 32)
    groups_of_8 = Groups(W, h, torch.ones(8), torch.ones(8), bits=4, sym=True)
    with pytest.raises(ValueError, match=message):
        search_by_c(groups_of_8._replace(**changes))


def test_other_searches_and_sizes_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(4, 96)
    assert unsupported_reason(weight, 32, weighted=False) == "that is for a search by the Hessian"
    reason = "that is for groups of a multiple of 16, not of 24"
    assert unsupported_reason(weight, 24, weighted=True) == reason
    assert "meta" in str(unsupported_reason(weight.to("meta"), 32, weighted=True))
    W, h = groups(6, 4, 32)
    compiled = search_grid(W.view(1, 128), h, 4, 32, sym=True, search="hessian")
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    grid = search_grid(W.view(1, 128), h, 4, 32, sym=True, search="hessian")
    assert torch.equal(grid.scales, compiled.scales)
