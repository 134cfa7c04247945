"""Products with plain matrices by each way that a CPU may take, beside float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compute.conftest import NAMES, lower
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenq.compute import cpu, dense


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Assert that sums are float32's, rounded once."""
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    size = x.double().norm(dim=-1, keepdim=True) * weight.double().norm(dim=1) + 1
    last = 2**-8 if found.dtype is torch.bfloat16 else 2**-22
    assert found.dtype is x.dtype and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= last * exact.abs() + 2e-6 * size).all()


@pytest.mark.parametrize("name", [*NAMES, "torch"])
@settings(max_examples=40)
@given(
    rows=st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 95, 96, 200])),
    width=st.one_of(st.integers(1, 300), st.integers(1, 10).map(lambda lines: 32 * lines)),
    outs=st.integers(1, 100),
    with_bias=st.booleans(),
    dtypes=st.sampled_from(
        [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32,) * 2]
    ),
)
def test_any_rows_are_summed_in_float32_and_rounded_once(
    name: str, rows: int, width: int, outs: int, with_bias: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, weight = drawn(rows, rows, width, dtype=dtypes[0]), drawn(1, outs, width, dtype=dtypes[1])
    bias = drawn(2, outs).to(x.dtype) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setenv(cpu.VARIABLE, name)
        else:
            lower(name, patch)
        near(dense.multiply(x, weight, bias), x, weight, bias)
        near(dense.multiply(x, weight.t().contiguous().t(), bias), x, weight, bias)


def test_a_matrix_of_many_outputs_is_widened_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "float32_is_faster", lambda: True)
    x, weight, bias = drawn(0, 12, 8, 48), drawn(1, 2 * dense._OUTPUTS_AT_ONCE + 3, 48), drawn(2, 8195)
    near(dense.multiply(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [32, 96, 576])
def test_a_row_does_not_depend_on_the_others(variant: str, width: int, dtype: torch.dtype) -> None:
    x, weight = drawn(0, 31, width, dtype=dtype), drawn(1, 70, width, dtype=dtype)
    alone = torch.cat([dense.multiply(row, weight) for row in x.split(1)])
    for rows in (2, 3, 8, 17, 31):
        assert torch.equal(dense.multiply(x[:rows], weight), alone[:rows]), variant


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dense.multiply(drawn(0, 3, 8), drawn(0, 4, 9)), "do not fit"),
        (lambda: dense.multiply(drawn(0, 3, 8), drawn(0, 4, 8).float()), "weight is torch.float32"),
        (lambda: dense.multiply(drawn(0, 3, 8), drawn(0, 4, 8).to("meta")), "on meta"),
        (lambda: dense.multiply(drawn(0, 3, 8), drawn(0, 4, 8), drawn(0, 3)), "bias is"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
