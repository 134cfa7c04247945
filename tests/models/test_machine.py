from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwenq.compute import cpu
from qwenq.errors import UsageError
from qwenq.models.machine import compute_dtype, product_dtype, resolve_device, resolve_dtype

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="reads the kernel's list of CPU features")
def test_bfloat16_only_where_the_cpu_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    words = set(CPUINFO.read_text().split())
    native = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    assert compute_dtype("cpu") == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize(
    ("has", "running", "quantising", "because"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.bfloat16, torch.float32, "more slowly"),
        (
            {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True},
            torch.bfloat16, torch.bfloat16, "native on this CPU",
        ),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16, torch.bfloat16, "native on this CPU"),
        ({"cpu_name": "Neoverse", "bf16": True}, torch.bfloat16, torch.bfloat16, "native on this CPU"),
        ({"avx512_bf16": True}, torch.bfloat16, torch.bfloat16, "native on this CPU"),
        ({"cpu_name": "Intel Core"}, torch.float32, torch.float32, "only emulates bfloat16"),
    ],
)  # fmt: skip
def test_whole_texts_pass_in_bfloat16_only_where_that_multiplies_faster(
    has: dict[str, Any],
    running: torch.dtype,
    quantising: torch.dtype,
    because: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "_capabilities", lambda: has)
    assert (compute_dtype("cpu"), product_dtype("cpu")) == (running, quantising)
    dtype, why = resolve_dtype("auto", torch.device("cpu"))
    assert dtype is quantising
    assert because in why
    asked, why = resolve_dtype("bfloat16", torch.device("cpu"))
    assert asked is torch.bfloat16 and "as asked" in why


def test_a_lowered_cpu_answers_as_one_that_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [variant.name for variant in cpu.variants_here()]
    if "avx2" not in names[1:]:
        pytest.skip("no better variant than avx2 to lower from")
    monkeypatch.setenv(cpu.VARIABLE, "avx2")
    assert compute_dtype("cpu") is product_dtype("cpu") is torch.float32
    assert cpu.float32_is_faster() and not cpu.vectorises_512_bits()
    monkeypatch.delenv(cpu.VARIABLE)
    itself = compute_dtype("cpu")
    for name in ("torch", names[0]):
        monkeypatch.setenv(cpu.VARIABLE, name)
        assert compute_dtype("cpu") is itself, f"{name} lowers nothing"


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_other_devices_compute_in_float32(device: torch.device | str) -> None:
    assert compute_dtype(device) == product_dtype(device) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    ampere = torch.cuda.get_device_capability()[0] >= 8
    assert compute_dtype("cuda") == (torch.bfloat16 if ampere else torch.float16)


@pytest.mark.parametrize("name", ["meta", "mps", "tpu", "", "cuda:x", "cpu cuda"])
def test_a_device_that_nothing_here_runs_on_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"(?s)is not a device.*use cpu, cuda"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused_with_what_is() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert resolve_device("auto").type == ("cuda" if count else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=rf"cuda:{count} cannot be used: {count} CUDA GPU"):
        resolve_device(f"cuda:{count}")
