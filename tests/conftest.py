"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from elsewhere import run_there, way_for

from qwenq.compute.build import VARIANTS

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts to interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """How long an example takes is the machine's affair. The clients' environment has no hypothesis."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("no deadline", deadline=None)
        settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real benchmark files, for development; absent in a fresh checkout."""
    folder = Path(os.environ.get("QWENQ_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real benchmark files in {folder} (or $QWENQ_TEST_DATA)")
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests that may not run as this process: see elsewhere.py."""
    if way := way_for(pyfuncitem):
        run_there(pyfuncitem, way)
        return True
    return None


@pytest.fixture(params=[variant.name for variant in VARIANTS], scope="module")
def each_variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests for each variant of the C library; skip those that this CPU cannot run."""
    from qwenq.compute import cpu

    name = request.param
    if name not in [variant.name for variant in cpu.variants_here()]:
        pytest.skip(f"this CPU cannot run {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.VARIABLE, name)
        assert cpu.variant_name() == name
        yield name
