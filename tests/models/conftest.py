"""Fixtures of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from loopback_hub import Hub, serve


@pytest.fixture
def hub() -> Iterator[Hub]:
    """One repository, `tiny/llama`; it misbehaves as a test tells it to."""
    with serve() as served:
        yield served
