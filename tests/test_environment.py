from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qwenq.environment import environment


def test_it_says_what_ran_and_is_json() -> None:
    found = environment()
    json.dumps(found, allow_nan=False)
    assert found["versions"]["qwenq"]
    assert found["versions"]["torch"]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert found["memory_bytes"] > 2**28


def test_it_names_no_machine() -> None:
    assert os.uname().nodename not in json.dumps(environment())


def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from qwenq.environment import environment; environment(); "
        "print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_threads_are_torchs_where_it_is_loaded() -> None:
    import torch

    assert environment()["cpu"]["threads"] == torch.get_num_threads()


class _Nvml(SimpleNamespace):
    """A driver with one GPU, or one that fails at the function named ``broken``."""

    NVMLError = RuntimeError
    broken = ""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name == object.__getattribute__(self, "broken"):
            raise RuntimeError("driver/library version mismatch")
        return object.__getattribute__(self, name)


def driver(broken: str = "") -> _Nvml:
    return _Nvml(
        broken=broken,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "GPU X",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * 2**30),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, 0),
    )


def test_gpus_come_from_nvidias_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    gpu = {"name": "GPU X", "memory_bytes": 80 * 2**30, "capability": "9.0", "driver": "580.1"}
    assert environment()["gpus"] == [gpu]


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_broken_driver_is_no_failure(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver(broken))
    assert environment()["gpus"] in (None, [])
