from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runtime.attention_oracle import CPU, SPANS, error
from torch import Tensor

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.attention import BACKENDS, attention_backend, available, flash, of_row
from qwenq.runtime.attention.backends import Autotuned
from qwenq.runtime.attention.flash import Flash
from qwenq.runtime.cache import Span

CUDA = torch.device("cuda")
HEADS = [(4, 4, 16), (6, 2, 24)]


@pytest.mark.parametrize("name", ["off", "sdpa", "grouped"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("heads", "shared", "d"), HEADS)
def test_cpu_backends_agree_with_float64(name: str, span: str, heads: int, shared: int, d: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        backend = attention_backend(name, CPU, dtype)
        assert backend.name == name
        assert torch.__version__ in backend.implementation
        assert error(backend, dtype, (heads, shared), d, *SPANS[span]) < tolerance


def last_query_at_last_key(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
    """What a flash kernel of today computes: its causal mask is aligned at the end."""
    assert queries.shape[1] % keys.shape[1] == 0
    keys, values = (x.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for x in (keys, values))
    tokens, end = queries.shape[2], keys.shape[2]
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(tokens, end, dtype=torch.bool).triu(end - tokens + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize(("heads", "shared", "d"), HEADS)
def test_flash_kernels_get_only_masks_that_they_have(span: str, heads: int, shared: int, d: int) -> None:
    backend = Flash("v2", "reference", last_query_at_last_key)
    assert error(backend, torch.float32, (heads, shared), d, *SPANS[span]) < 1e-5


@pytest.mark.parametrize(("heads", "shared", "d"), HEADS)
def test_a_step_of_rows_whose_lengths_lie_on_the_device(heads: int, shared: int, d: int) -> None:
    asked = []

    def step(queries: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
        asked.append((queries.shape[:2], length.dtype))
        end = int(length)
        return last_query_at_last_key(queries[None], keys[None, :, :end], values[None, :, :end], False)[0]

    backend = Flash("v2", "reference", last_query_at_last_key, step)
    assert backend.capturable and not Flash("v2", "reference", last_query_at_last_key).capturable
    assert error(backend, torch.float32, (heads, shared), d, *SPANS["step-ragged"]) < 1e-5
    assert set(asked) == {((shared, heads // shared), torch.int32)}


def test_a_step_reads_no_key_twice() -> None:
    shapes = []

    def kernel(queries: Tensor, keys: Tensor, values: Tensor, causal: bool) -> Tensor:
        shapes.append((tuple(queries.shape), tuple(keys.shape), causal))
        return queries

    span = Span(torch.tensor([[9]]), 9, 10, causal=False, mask=None)
    keys = torch.zeros(1, 2, 10, 8)
    Flash("v2", "reference", kernel)(torch.zeros(1, 6, 1, 8), keys, keys, span)
    assert shapes == [((1, 2, 3, 8), (1, 2, 10, 8), False)]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def install(monkeypatch: pytest.MonkeyPatch, version: str, **functions: Any) -> None:
    """Pretend that a flash-attn package is installed."""
    monkeypatch.setattr(flash, "package_version", lambda name: version)
    monkeypatch.setattr(flash, "import_module", lambda name: SimpleNamespace(**functions))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("span", SPANS)
def test_v2_takes_the_package_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, span: str) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        moved = (x.transpose(1, 2).float() for x in (q, k, v))  # the package has tokens before heads
        return last_query_at_last_key(*moved, causal).transpose(1, 2).to(q.dtype)

    install(monkeypatch, "2.8.3", flash_attn_func=flash_attn_func)
    backend = attention_backend("v2", CUDA, torch.bfloat16)
    assert backend.implementation == "flash-attn 2.8.3"
    assert error(backend, torch.bfloat16, (6, 2), 24, *SPANS[span]) < 2e-2


@pytest.mark.usefixtures("hopper")
def test_without_the_package_v2_is_torchs_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "package_version", lambda name: None)
    backend = attention_backend("v2", CUDA, torch.bfloat16)
    assert backend.implementation == f"torch {torch.__version__} SDPA, flash kernel (FlashAttention-2)"
    x = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16)
    span = Span(torch.arange(4).unsqueeze(0), 0, 4, causal=True, mask=None)
    with pytest.raises(
        NotImplementedError
    ):  # on the CPU this operator does not exist: nothing takes its place
        backend(x, x, x, span)


@pytest.mark.usefixtures("hopper")
def test_a_package_that_cannot_be_imported_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c104")

    monkeypatch.setattr(flash, "package_version", lambda name: "2.8.3")
    monkeypatch.setattr(flash, "import_module", broken)
    with pytest.raises(UnsupportedError, match=r"cannot be imported: undefined symbol") as caught:
        attention_backend("v2", CUDA, torch.bfloat16)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "device", "dtype", "capability", "reason"),
    [
        ("v2", CPU, torch.bfloat16, (9, 0), "made for NVIDIA GPUs, and this is a cpu"),
        ("v1", CPU, torch.float16, (9, 0), "made for NVIDIA GPUs, and this is a cpu"),
        ("split", CPU, torch.float16, (9, 0), "made for NVIDIA GPUs, and this is a cpu"),
        ("v2", CUDA, torch.float32, (9, 0), "float16 and bfloat16, not in float32"),
        ("v1", CUDA, torch.float32, (9, 0), "float16 and bfloat16, not in float32"),
        ("v2", CUDA, torch.float16, (7, 5), "compute capability 8.0, this GPU has 7.5"),
        ("split", CUDA, torch.float16, (7, 0), "compute capability 8.0, this GPU has 7.0"),
    ],
)
def test_unsupported_backends_raise_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UnsupportedError, match=f"attention {name}: .*{reason}") as caught:
        attention_backend(name, device, dtype)
    assert caught.value.where == f"--attention {name}"
    assert "--attention" in str(caught.value.hint)


def test_on_a_cpu_no_other_dtype_is_advised_that_would_not_run_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("v2", "v1", "split"):
        with pytest.raises(UnsupportedError, match="made for NVIDIA GPUs") as caught:
            attention_backend(name, CPU, torch.float32)
        assert "dtype" not in str(caught.value.hint)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_only_fp32_rows_of_the_cards_columns_run_off_and_say_so(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    ran, why = of_row(name, device, dtype)
    if (device, dtype) == (CUDA, torch.float32) and name in ("v2", "v1"):
        assert ran == "off"
        assert why == f"attention {name} takes no float32: this row ran off, as FP32 rows of the cards did"
    else:
        assert (ran, why) == (name, None)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no attention 'flash'") as caught:
        attention_backend("flash", CPU, torch.float32)
    assert caught.value.hint == f"use {', '.join(BACKENDS)}"
    assert {"v2", "v1", "off", "sdpa", "split", "best"} <= set(BACKENDS)


def test_available_lists_every_backend_with_implementation_or_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    listed = available(CPU, torch.bfloat16)
    assert tuple(each.name for each in listed) == BACKENDS
    assert {each.name for each in listed if each.implementation is None} == {"v2", "v1", "split"}
    assert all((each.implementation is None) != (each.reason is None) for each in listed)
    assert "the fastest of off, sdpa" in str(listed[-1].implementation)


class Slow:
    """Takes longer for prompts, or for steps."""

    def __init__(self, name: str, prompt: float, step: float) -> None:
        self.name, self.implementation = name, f"{name} 1.0"
        self._seconds = {False: prompt, True: step}
        self.calls = 0

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        self.calls += 1
        time.sleep(self._seconds[queries.shape[2] == 1])
        return queries


def test_best_takes_the_faster_backend_for_prompts_and_for_steps() -> None:
    one, other = Slow("one", 0.0, 0.02), Slow("other", 0.02, 0.0)
    best = Autotuned([one, other], CPU, torch.float32)
    assert best.implementation.startswith(
        "fastest measured at load among one, other: prefill one (one 1.0), "
    )
    assert best.implementation.endswith("decode other (other 1.0)")
    before = one.calls, other.calls
    span = Span(torch.tensor([[3]]), 3, 4, causal=False, mask=None)
    best(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), span)
    assert (one.calls, other.calls) == (before[0], before[1] + 1)


def test_best_of_this_machine_agrees_with_float64() -> None:
    backend = attention_backend("best", CPU, torch.float32)
    assert backend.name == "best"
    for span in ("prompt", "step-ragged"):
        assert error(backend, torch.float32, (6, 2), 24, *SPANS[span]) < 1e-5
