"""Fixtures shared by all rooms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real benchmark files, for development; absent in a fresh checkout."""
    folder = Path(os.environ.get("QWENQ_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real benchmark files in {folder} (or $QWENQ_TEST_DATA)")
    return folder
