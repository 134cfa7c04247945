"""Folders that vLLM is to load, and where the figures go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_client import Record, Runner, python

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python()
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Written to $QWENQ_VLLM_REPORT, or to build/interop, when all tests have passed or failed."""
    found = Record()
    yield found
    if found.rows:
        found.write(Path(os.environ.get("QWENQ_VLLM_REPORT", ROOT / "build" / "interop")))


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """vLLM, to be asked about folders."""
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$QWENQ_INTEROP_INT4 where set, else the bundled model, quantised now."""
    given = os.environ.get("QWENQ_INTEROP_INT4")
    return Path(given).resolve() if given else bundled(tmp_path_factory, "int4", "--bits", "4")


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$QWENQ_INTEROP_INT8 where set, else the bundled model, quantised now."""
    given = os.environ.get("QWENQ_INTEROP_INT8")
    return Path(given).resolve() if given else bundled(tmp_path_factory, "int8", "--bits", "8")


def bundled(tmp_path_factory: pytest.TempPathFactory, name: str, *options: str) -> Path:
    """The bundled model, quantised now on little text."""
    python()
    folder = tmp_path_factory.mktemp("vllm") / name
    command = [sys.executable, "-m", "qwenq", "quantize", *options, "--out", folder]
    quick = ["--samples", "16", "--seq-len", "256", "--group-size", "64"]
    done = subprocess.run([*command, *quick], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
