"""Every operation of ``qwenq.compute`` is tested for every variant that this machine can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenq.compute import cpu
from qwenq.compute.build import VARIANTS

NAMES = tuple(variant.name for variant in VARIANTS)
TESTS = Path(__file__).parents[1]


def variant_test_files() -> list[str]:
    """Return the files whose tests run variants of the C library."""
    others = (path for path in sorted(TESTS.rglob("test_*.py")) if path.parent.name != "compute")
    here = {"test_arm.py", "test_sanitized.py", "test_wheels.py"}  # they run those files again, or none
    return [
        *(str(path) for path in sorted((TESTS / "compute").glob("test_*.py")) if path.name not in here),
        *(str(path) for path in others if "from compute.conftest import" in path.read_text(encoding="utf-8")),
    ]


def lower(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a variant from here on; skip the test where the CPU cannot."""
    if name not in [variant.name for variant in cpu.variants_here()]:
        pytest.skip(f"this CPU cannot run {name}")
    monkeypatch.setenv(cpu.VARIABLE, name)
    assert cpu.variant_name() == name
    return name


@pytest.fixture(params=NAMES)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a variant of the C library, which runs during the test."""
    return lower(request.param, monkeypatch)
