from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenq.evals.check import module_error, round_to_nearest
from qwenq.gptq.grid import search_grid
from qwenq.models.gptq_format import QuantConfig


@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([16, 32, -1]),
    sym=st.booleans(),
    scale=st.sampled_from([1e-12, 0.02, 30.0]),
)
def test_rounding_is_what_the_quantiser_compares_itself_with(
    seed: int, bits: int, size: int, sym: bool, scale: float
) -> None:
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) * scale
    W[0] = 0
    quant = QuantConfig(bits=bits, group_size=size, sym=sym)
    width = 64 if size == -1 else size
    grid = search_grid(W, torch.ones(64), bits, width, sym=sym, search="none")
    assert torch.equal(round_to_nearest(W, quant), grid.values(grid.integers(W)))


def test_a_short_last_group_is_rounded_like_others() -> None:
    W = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    whole = round_to_nearest(W, QuantConfig(bits=4, group_size=32))
    assert torch.equal(whole[:, :32], round_to_nearest(W[:, :32], QuantConfig(bits=4, group_size=32)))
    assert torch.equal(whole[:, 32:], round_to_nearest(W[:, 32:], QuantConfig(bits=4, group_size=-1)))


def test_errors_are_shares_of_the_outputs_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(6, 8, generator=generator), torch.randn(20, 8, generator=generator)
    row = module_error("m", W, W * 0.9, x, QuantConfig(bits=4, group_size=8))
    assert row.error == pytest.approx(0.01, rel=1e-4)
    assert 0 < row.rtn_error < 0.05
    assert module_error("m", torch.zeros_like(W), torch.zeros_like(W), x, QuantConfig()).error == 0


def test_inputs_in_bfloat16_give_the_same_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 256, generator=generator) * torch.rand(256, generator=generator).square()
    x = torch.randn(300, 256, generator=generator)
    x[:, ::50] *= 100  # as activations are: a few columns hold most of the energy
    x = x.bfloat16()
    quant = QuantConfig(bits=4, group_size=64)
    Q = round_to_nearest(W, quant) * 1.01
    row, exact = module_error("m", W, Q, x, quant), x.double()
    energy = (exact @ W.double().T).square().sum()
    for share, other in ((row.error, Q), (row.rtn_error, round_to_nearest(W, quant))):
        assert share == pytest.approx(
            float((exact @ (W - other).double().T).square().sum() / energy), rel=1e-3
        )
