from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenq.models.precision import compute_dtype

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="reads the kernel's list of CPU features")
def test_bfloat16_only_where_the_kernel_says_the_cpu_has_it() -> None:
    words = set(CPUINFO.read_text().split())
    native = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    assert compute_dtype("cpu") == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_other_devices_compute_in_float32(device: torch.device | str) -> None:
    assert compute_dtype(device) == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    ampere = torch.cuda.get_device_capability()[0] >= 8
    assert compute_dtype("cuda") == (torch.bfloat16 if ampere else torch.float16)
