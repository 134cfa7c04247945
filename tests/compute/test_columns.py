"""Columns of a lazy block, rounded by torch and by compiled code: the same bits."""

from __future__ import annotations

import pytest
import torch
from gptq.problems import problem
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.compute import columns, cpu
from qwenq.compute.columns import Block, by_c, round_by_torch, round_columns, unsupported_reason
from qwenq.compute.grid import Rounded, search_grid
from qwenq.gptq.solver import gptq, inverse_factor, order_by_diagonal

pytestmark = pytest.mark.usefixtures("each_variant")


def block(seed: int, rows: int, count: int, *, bits: int = 4, group_size: int = 8, sym: bool = True) -> Block:
    """A lazy block whose columns lie in groups in no order."""
    draw = torch.Generator().manual_seed(seed)
    given = problem(seed, rows=rows, width=count, tokens=4 * count)
    H = given.H + 0.01 * given.H.diagonal().mean() * torch.eye(count)
    U = inverse_factor(H)
    assert U is not None
    width = -(-count // group_size) * group_size
    W = torch.nn.functional.pad(given.W, (0, width - count))
    grid = search_grid(W, torch.ones(width), bits, group_size, sym=sym, search="none")
    groups = torch.randint(width // group_size, (count,), generator=draw).tolist()
    integers = torch.full((count, rows), 255, dtype=torch.uint8)
    scales, zeros = (x.T.contiguous() for x in (grid.scales, grid.zeros))
    return Block(
        given.W.T.contiguous(), U, scales, zeros, groups, grid.levels, integers, torch.empty(count, rows)
    )


def copied(one: Block) -> Block:
    return one._replace(columns=one.columns.clone(), integers=one.integers.clone(), errors=one.errors.clone())


def rounded_by_both(one: Block) -> tuple[Block, Block]:
    """By compiled code and by torch; what they return is compared, too."""
    fast, slow = copied(one), copied(one)
    torch.testing.assert_close(by_c(fast), round_by_torch(slow), rtol=1e-5, atol=1e-12, equal_nan=True)
    return fast, slow


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(16, 200),
    count=st.integers(1, 80),
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([1, 8, 64]),
    sym=st.booleans(),
)
def test_any_block_comes_out_the_same_bit_for_bit(
    seed: int, rows: int, count: int, bits: int, group_size: int, sym: bool
) -> None:
    fast, slow = rounded_by_both(block(seed, rows, count, bits=bits, group_size=group_size, sym=sym))
    assert torch.equal(fast.integers, slow.integers)
    assert torch.equal(fast.errors, slow.errors)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_out_the_rows(threads: int) -> None:
    one, before = block(1, 333, 64), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast, slow = rounded_by_both(one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(fast.integers, slow.integers)
    assert torch.equal(fast.errors, slow.errors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_nan_and_infinity_stay_in_their_row(bad: float) -> None:
    one = block(2, 40, 24)
    one.columns[5, 33] = bad
    fast, slow = rounded_by_both(one)
    assert torch.equal(fast.integers, slow.integers)
    torch.testing.assert_close(fast.errors, slow.errors, rtol=0, atol=0, equal_nan=True)
    others = torch.arange(40) != 33
    assert fast.errors[:, others].isfinite().all()


def solved(seed: int, rows: int, *, reorder: bool, sym: bool, dead: int) -> tuple[Rounded, Rounded]:
    """The whole solver with compiled columns, and without."""
    given = problem(seed, rows=rows, width=192)
    H = given.H.clone()
    H[:, :dead], H[:dead] = 0, 0
    H.diagonal()[:dead] = H.diagonal().mean()
    H += 0.01 * H.diagonal().mean() * torch.eye(192)
    grid = search_grid(given.W, H.diagonal(), 4, 32, sym=sym, search="hessian")
    order = order_by_diagonal(H) if reorder else None
    U = inverse_factor(H, order)
    assert U is not None
    fast = gptq(given.W, U, grid, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "unsupported_reason", lambda _: "it is not wanted")
        return fast, gptq(given.W, U, grid, order)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(16, 100),
    reorder=st.booleans(),
    sym=st.booleans(),
    dead=st.integers(0, 3),
)
def test_a_whole_matrix_comes_out_the_same(seed: int, rows: int, reorder: bool, sym: bool, dead: int) -> None:
    fast, slow = solved(seed, rows, reorder=reorder, sym=sym, dead=dead)
    assert torch.equal(fast.integers, slow.integers)
    torch.testing.assert_close(fast.errors, slow.errors, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": torch.zeros(32, 24).T}, "columns: .* not contiguous"),
        ({"columns": torch.zeros(24, 32, dtype=torch.float64)}, "columns: torch.float64"),
        ({"U": torch.eye(23)}, "U: .* not torch.float32 .24, 24."),
        ({"zeros": torch.zeros(1, 32)}, "zeros: "),
        ({"integers": torch.zeros(24, 32)}, "integers: torch.float32"),
        ({"errors": torch.zeros(24, 31)}, "errors: "),
        ({"groups": [3] * 24}, "24 columns in groups"),
        ({"groups": [0] * 23}, "24 columns in groups"),
        (
            {"scales": torch.ones(3, 31), "zeros": torch.ones(3, 31)},
            "scales: .* not .* .3, 32.",
        ),
    ],
)
def test_wrong_shapes_dtypes_and_strides_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        by_c(block(0, 32, 24)._replace(**changes))


def test_other_dtypes_devices_and_machines_run_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float64" in str(unsupported_reason(torch.empty(4, 64, dtype=torch.float64)))
    assert "meta" in str(unsupported_reason(torch.empty(4, 64, device="meta")))
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    assert unsupported_reason(torch.empty(4, 64)) == "QWENQ_CPU=torch turns it off"
    one = block(0, 20, 24)
    ours, plain = copied(one), copied(one)
    assert torch.equal(round_columns(ours), round_by_torch(plain))
    assert torch.equal(ours.integers, plain.integers)
