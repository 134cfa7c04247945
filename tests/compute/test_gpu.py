"""Whether Triton's kernels can run, and what is said where they cannot."""

from __future__ import annotations

import shutil
import sysconfig
from importlib import metadata

import pytest
import torch

from qwenq.compute.gpu import unsupported_reason

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that Triton needs, though no GPU may be here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("CPATH", "/headers")


def test_a_gpu_with_all_that_it_takes() -> None:
    assert unsupported_reason(CUDA) is None
    assert unsupported_reason(CPU) == "Triton kernels need a CUDA GPU, and this is a cpu"


def test_the_interpreter_takes_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unsupported_reason(CPU) is None


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    for device in (CPU, CUDA):
        assert str(unsupported_reason(device)).startswith("triton is not installed; pip install triton")


def test_a_gpu_that_is_too_old_is_named_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 and later, this GPU has 7.5" in str(unsupported_reason(CUDA))


def test_without_a_c_compiler_or_its_headers_no_kernel_can_be_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CPATH")
    monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: "/nowhere")
    assert "Python.h, which is not in /nowhere; apt-get install python3-dev" in str(unsupported_reason(CUDA))
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler, and there is none; apt-get install gcc" in str(unsupported_reason(CUDA))
