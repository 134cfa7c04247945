"""Every process collects the same tests, under the same ids, in the same order, on every machine.

Workers of pytest-xdist compare what they collected and stop where it differs. No parameter may come from the
clock, from chance, from the order of a set, from an address, or from what this machine can do: a test skips
itself when it runs. Packages that are not installed are the exception: all processes of an environment lack
the same ones.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLLECT = ("--collect-only", "-q", "-p", "no:cacheprovider", "tests")

BARE_MACHINE = """
import os, sys
import pytest, torch
torch.cpu.get_capabilities = dict
os.cpu_count = lambda: 1
sys.exit(pytest.main(sys.argv[1:]))
"""
"""Runs pytest with one core whose CPU has no features beyond its architecture's first."""


def collecting(*command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled files save half of the time
    return subprocess.Popen(
        [sys.executable, *command, *COLLECT],
        cwd=ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ids(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    return [line for line in output.splitlines() if "::" in line and not line.startswith("SKIPPED")]


def test_another_process_on_another_machine_collects_the_same() -> None:
    here = collecting("-m", "pytest", PYTHONHASHSEED="1")
    time.sleep(1.1)  # at no file in the same second
    there = collecting(
        "-c",
        BARE_MACHINE,
        PYTHONHASHSEED="2",
        ATEN_CPU_CAPABILITY="default",
        CUDA_VISIBLE_DEVICES="",
        QWENQ_CPU="torch",
        PATH=os.pathsep,
    )
    one, other = ids(here), ids(there)
    assert len(one) > 1000
    differences = list(difflib.unified_diff(one, other, "here", "there", lineterm="", n=0))
    assert not differences, "\n".join(differences[:20])
