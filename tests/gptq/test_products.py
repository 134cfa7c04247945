"""Means of products, by torch and by compiled code, beside float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.native_functions import in_both
from torch import Tensor

from qwenq.distributed import ALONE, Team
from qwenq.gptq import columns
from qwenq.gptq.products import Float32Products, Products, mirror, native_why_not, passed_over, products
from qwenq.gptq.quantise import how_summed
from qwenq.native import support

CPU = torch.device("cpu")


def drawn(seed: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 1, width)).to(dtype)  # columns of very different size, as channels are


def native(rows: int, columns: int, dtype: torch.dtype, *, symmetric: bool = False) -> Products:
    made = products(rows, columns, torch.empty(0, dtype=dtype), symmetric=symmetric)
    assert not isinstance(made, Float32Products)
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
def test_batches_that_are_no_block_of_memory(dtype: torch.dtype) -> None:
    x = drawn(0, 64, 96, dtype)
    compiled = native(48, 96, dtype)
    compiled.add(x[:, ::2], x.T.contiguous().T)
    assert relative_error(compiled.mean(), x[:, ::2], x) < 2e-6


@in_both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_column_alone(dtype: torch.dtype, bad: float) -> None:
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
def test_memory_that_is_not_what_it_should_be_is_not_read(
    dtype: torch.dtype, X: Tensor, Y: Tensor, said: str
) -> None:
    X = X if X.dtype is torch.float16 else X.to(dtype)
    with pytest.raises(ValueError, match=said):
        native(32, 48, dtype).add(X, Y.to(dtype))


def test_other_dtypes_and_devices_are_left_to_torch() -> None:
    assert isinstance(products(8, 8, torch.empty(0).half()), Float32Products)
    assert "float16" in str(native_why_not(torch.float16, CPU))
    assert "cuda" in str(native_why_not(torch.bfloat16, torch.device("cuda")))


def test_what_is_missed_is_said_and_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "why_not", lambda *features: "llvmlite is not installed")
    assert isinstance(products(8, 8, torch.empty(0, dtype=torch.bfloat16)), Float32Products)
    said = passed_over(torch.bfloat16, CPU)
    assert said is not None
    slower = "left to torch, which takes longer, because"
    assert said == f"Hessians, scales and rounding are {slower} llvmlite is not installed"
    assert passed_over(torch.float32, CPU) == said
    for dtype, exact in ((torch.float16, False), (torch.float32, True), (torch.bfloat16, True)):
        said = passed_over(dtype, CPU, exact=exact)
        assert said == f"scales and rounding are {slower} llvmlite is not installed"
    assert how_summed(torch.bfloat16, CPU, ALONE) == "torch"
    lacking = "this CPU has no avx512bf16"
    monkeypatch.setattr(support, "why_not", lambda *features: lacking if "avx512bf16" in features else None)
    said = passed_over(torch.bfloat16, CPU)
    assert said == f"Hessians are {slower} {lacking}"
    assert passed_over(torch.float32, CPU) is None
    assert passed_over(torch.bfloat16, CPU, exact=True) is None
    monkeypatch.setattr(support, "why_not", lambda *features: None)
    assert passed_over(torch.bfloat16, CPU) is None
    assert how_summed(torch.bfloat16, CPU, ALONE) == "compiled"
    assert how_summed(torch.float16, CPU, ALONE) == "torch"
    assert how_summed(torch.bfloat16, CPU, Team(launched=True)) == "exact"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_kernel_for_columns_is_what_can_be_missed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason: str | None = "triton is not installed"
    monkeypatch.setattr(columns.gpu, "why_not_triton", lambda device: reason)
    said = "rounding is left to torch, which takes longer, because triton is not installed"
    assert passed_over(dtype, torch.device("cuda")) == said
    reason = None
    assert passed_over(dtype, torch.device("cuda")) is None
