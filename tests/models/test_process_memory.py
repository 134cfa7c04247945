"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qwenq.models.process_memory import return_freed_memory


def resident() -> int:
    """Bytes of memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_holes_between_living_tensors_are_returned() -> None:
    pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]  # 200 MB, below malloc's own limit
    kept = pieces[::10]
    before = resident()
    del pieces
    return_freed_memory()
    assert before - resident() > 100e6
    assert all(int(piece[0]) == 1 for piece in kept)


def test_it_may_be_called_at_any_time() -> None:
    return_freed_memory()
    return_freed_memory()
