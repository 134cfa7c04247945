from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program of that name before all others."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_gpus_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'GPU X, 81920, 9.0, 580.1'")
    gpu = {"name": "GPU X", "memory_bytes": 80 * 2**30, "capability": "9.0", "driver": "580.1"}
    assert environment()["gpus"] == [gpu]


@pytest.mark.parametrize("script", ["echo 'Failed to initialize NVML' && exit 18", "echo No devices"])
def test_a_broken_driver_is_no_failure(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert environment()["gpus"] is None
