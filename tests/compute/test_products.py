"""Means of products, by torch and by compiled code, beside float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenq.compute import columns, cpu
from qwenq.compute.ops import fallback_notice
from qwenq.compute.products import CProducts, Float32Products, mirror, products
from qwenq.distributed import ALONE, Team
from qwenq.gptq.pipeline import how_summed

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("each_variant")
in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(seed: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 1, width)).to(dtype)  # columns of very different size, as channels are


def native(rows: int, columns: int, dtype: torch.dtype, *, symmetric: bool = False) -> CProducts:
    made = products(rows, columns, torch.empty(0, dtype=dtype), symmetric=symmetric)
    assert isinstance(made, CProducts)
    return made


def relative_error(got: Tensor, X: Tensor, Y: Tensor) -> float:
    """Largest error beside the size of the two columns that are multiplied."""
    X, Y = X.double(), Y.double()
    size = X.norm(dim=0)[:, None] * Y.norm(dim=0)
    return float(((got.double() - 2 / len(X) * X.T @ Y).abs() / (2 / len(X) * size)).max())


@in_both
@settings(max_examples=40)
@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 130),
    batches=st.lists(st.integers(1, 1100), min_size=1, max_size=3),
)
def test_any_shape_is_multiplied_as_precisely_as_in_float32(
    dtype: torch.dtype, rows: int, columns: int, batches: list[int]
) -> None:
    X, Y = drawn(1, sum(batches), rows, dtype), drawn(2, sum(batches), columns, dtype)
    compiled, plain = native(rows, columns, dtype), Float32Products(rows, columns, "cpu")
    for x, y in zip(X.split(batches), Y.split(batches), strict=True):
        compiled.add(x, y)
        plain.add(x, y)
    assert compiled.mean().shape == (rows, columns)
    assert relative_error(compiled.mean(), X, Y) < 2e-6
    assert relative_error(plain.mean(), X, Y) < 2e-6


@in_both
@pytest.mark.parametrize("width", [16, 48, 70, 576])
def test_the_lower_triangle_of_a_symmetric_mean_is_that_of_the_whole(dtype: torch.dtype, width: int) -> None:
    """Bit for bit: the drift of inputs that have not drifted is then exactly zero."""
    x = drawn(0, 700, width, dtype).view(7, 100, width)
    half, whole = native(width, width, dtype, symmetric=True), native(width, width, dtype)
    for batch in (x[:3], x[3:]):
        half.add(batch, batch)
        whole.add(batch, batch)
    assert torch.equal(mirror(half.mean().clone()), whole.mean())


@in_both
def test_strided_batches_are_multiplied(dtype: torch.dtype) -> None:
    x = drawn(0, 64, 96, dtype)
    compiled = native(48, 96, dtype)
    compiled.add(x[:, ::2], x.T.contiguous().T)
    assert relative_error(compiled.mean(), x[:, ::2], x) < 2e-6


@in_both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_column(dtype: torch.dtype, bad: float) -> None:
    x = drawn(0, 65, 33, dtype)
    x[64, 32] = bad
    compiled = native(33, 33, dtype)
    compiled.add(x, x)
    finite = compiled.mean().isfinite()
    assert finite[:32, :32].all()
    assert not finite[32].any()
    assert not finite[:, 32].any()


@in_both
@pytest.mark.parametrize(
    ("X", "Y", "said"),
    [
        (torch.ones(8, 32, dtype=torch.float16), torch.ones(8, 48), "float16"),
        (torch.ones(8, 32), torch.ones(8, 32), "48"),
        (torch.ones(8, 32), torch.ones(6, 48), "8 and 6 tokens"),
    ],
)
def test_wrong_widths_dtypes_and_tokens_are_refused(
    dtype: torch.dtype, X: Tensor, Y: Tensor, said: str
) -> None:
    X = X if X.dtype is torch.float16 else X.to(dtype)
    with pytest.raises(ValueError, match=said):
        native(32, 48, dtype).add(X, Y.to(dtype))


def test_other_dtypes_and_devices_are_left_to_torch() -> None:
    assert isinstance(products(8, 8, torch.empty(0).half()), Float32Products)
    assert "float16" in str(cpu.unsupported_input(CPU, torch.float16))
    assert "cuda" in str(cpu.unsupported_input(torch.device("cuda"), torch.bfloat16))


def test_the_fallback_to_torch_has_a_notice_and_another_run_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fallback_notice(torch.bfloat16, CPU) is None
    assert how_summed(torch.bfloat16, CPU, ALONE) == "compiled"
    assert how_summed(torch.float16, CPU, ALONE) == "torch"
    assert how_summed(torch.bfloat16, CPU, Team(launched=True)) == "exact"
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    assert isinstance(products(8, 8, torch.empty(0, dtype=torch.bfloat16)), Float32Products)
    assert how_summed(torch.bfloat16, CPU, ALONE) == "torch"
    slower = "run in torch, which takes longer, because QWENQ_CPU=torch turns it off"
    for dtype in (torch.bfloat16, torch.float32):
        assert (
            fallback_notice(dtype, CPU) == f"rounding and coordinate descent, scale search, Hessians {slower}"
        )
    assert fallback_notice(torch.float16, CPU) == f"rounding and coordinate descent, scale search {slower}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_notice_names_the_missing_kernel_for_columns(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason: str | None = "triton is not installed"
    monkeypatch.setattr(columns.gpu, "unsupported_reason", lambda device: reason)
    said = "rounding and coordinate descent run in torch, which takes longer, because triton is not installed"
    assert fallback_notice(dtype, torch.device("cuda")) == said
    reason = None
    assert fallback_notice(dtype, torch.device("cuda")) is None
