"""A tiny model, its calibration set, and `qwenq quantize` on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantize_shell import QuantizeShell
from tiny_families import write_calibration, write_family


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("quantize") / "tiny")


@pytest.fixture(scope="session")
def calibration(tiny_model: Path) -> Path:
    return write_calibration(tiny_model, tiny_model.parent / "calibration.safetensors")


@pytest.fixture
def quantize(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> QuantizeShell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QWENQ_DEBUG", raising=False)
    return QuantizeShell(monkeypatch, capsys, tiny_model)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model folder of one's own to break."""
    return write_family(tmp_path / "damaged")
