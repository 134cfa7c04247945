"""No kernel reads or writes outside its memory, or does what C leaves undefined, in any test of any variant.

The library is compiled with AddressSanitizer and UndefinedBehaviorSanitizer, and all tests that run a variant
run once more with it. Memory of tensors is then surrounded by memory that nobody may touch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compute.conftest import TESTS, variant_test_files

from qwenq.compute import build, cpu

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
LOADED = """
from qwenq.compute import cpu
import ctypes
library = cpu.library()
assert isinstance(library, cpu.Library), library
assert library.handle.__asan_init
print(library.handle._name)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables under which Python loads the library with the sanitizers, compiled by GCC."""
    if shutil.which("gcc") is None or not cpu.variants_here():
        pytest.skip("needs gcc, and a CPU that runs a variant")
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("needs libasan")
    folder = tmp_path_factory.mktemp("sanitized")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CC", "gcc")
        build.build(folder, extra=FLAGS)
    return {
        **os.environ,
        cpu.FOLDER_VARIABLE: str(folder),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(TESTS.parent),
        "OMP_NUM_THREADS": "1",  # barriers spin: several threads on shared cores take ten times as long
    }


def test_nothing_is_read_or_written_outside(environment: dict[str, str]) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith(environment[cpu.FOLDER_VARIABLE])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *variant_test_files()]
    run = subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]


def test_the_sanitizer_sees_what_lies_outside(environment: dict[str, str]) -> None:
    """Half of the outputs have no memory: the proof that the other test can fail."""
    too_short = """
import torch
from qwenq.compute import cpu, linear
integers = torch.zeros(32, 64, dtype=torch.uint8)
layer = linear.pack(integers, torch.ones(32, 1), 4)
x, y = torch.zeros(1, 64), torch.empty(16)
workspace = torch.empty(linear.activation_bytes(1, 64), dtype=torch.uint8)
cpu.call("linear", layer.fields, x, y, workspace, 1, 0, 0)
"""
    run = subprocess.run(
        [sys.executable, "-c", too_short], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "ERROR: AddressSanitizer" in run.stderr
