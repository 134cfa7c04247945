"""Every operation of ``qwenq.compute`` is tested for every variant that this machine can run."""

from __future__ import annotations

import pytest

from qwenq.compute import cpu
from qwenq.compute.build import VARIANTS

NAMES = tuple(variant.name for variant in VARIANTS)


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
