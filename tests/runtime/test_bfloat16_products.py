"""Products of many rows by either unit of the CPU: of kernels over integers, and of plain matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime.small_models import small_model

from qwenq.runtime import bfloat16_products, engine, linear
from qwenq.runtime.linear import Dense


@pytest.mark.parametrize("by_float32", [False, True])
@settings(max_examples=30)
@given(rows=st.integers(1, 200), columns=st.integers(1, 300), outputs=st.integers(1, 100))
def test_many_rows_are_summed_in_float32_and_rounded_once(
    by_float32: bool, rows: int, columns: int, outputs: int
) -> None:
    draw = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=draw).bfloat16()
    weight = torch.randn(columns, outputs, generator=draw).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16_products, "float32_is_faster", lambda: by_float32)
        found = bfloat16_products.multiply(x, weight)
    assert found.dtype is torch.bfloat16
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=0)
    exact = x.double() @ weight.double()
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * size).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [linear._MANY_ROWS - 3, linear._MANY_ROWS])
def test_a_plain_matrix_is_unpacked_for_many_rows_alone(
    rows: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=draw).bfloat16() for shape in ((96, 64), (3, rows // 3, 64)))
    bias = torch.randn(96, generator=draw).bfloat16() if with_bias else None
    layer = Dense(weight, bias)
    if not layer._packed:
        pytest.skip("no packed matrices on this CPU")
    unpacked = []
    monkeypatch.setattr(linear, "float32_is_faster", lambda: True)
    monkeypatch.setattr(Dense, "weight", property(lambda _: unpacked.append(rows) or weight))
    found = layer(x)
    assert unpacked == ([rows] if rows >= linear._MANY_ROWS else [])
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == exact.shape and found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("faster", [False, True])
def test_a_row_of_results_says_which_unit_multiplied_prompts(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "float32_is_faster", lambda: faster)
    _, checkpoint = small_model("llama")
    said = {
        dtype: "prompts multiplied by float32 units"
        in engine.load(checkpoint, device="cpu", dtype=dtype, engine="fast").implementation
        for dtype in ("bfloat16", "float32")
    }
    assert said == {"bfloat16": faster, "float32": False}
