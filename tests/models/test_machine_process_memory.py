"""Freed memory goes back to the system."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenq.models import machine
from qwenq.models.machine import FreedMemory, return_freed_memory


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


def test_what_the_first_layer_left_is_kept_and_what_comes_on_top_goes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = iter([100, 110, 90, 111, 109])
    returned: list[str] = []
    monkeypatch.setattr(machine, "anonymous_bytes", lambda: next(held))
    monkeypatch.setattr(machine, "return_freed_memory", lambda: returned.append("once"))
    memory, after = FreedMemory(), []
    for _ in range(5):
        memory.layer_done()
        after.append(len(returned))
    assert after == [0, 0, 0, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_memory_that_no_file_backs_is_what_is_counted() -> None:
    before = machine.anonymous_bytes()
    # From the system itself: the allocator may hand out pages that an earlier test of this process has freed.
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.write(b"\1" * len(pages))
        assert machine.anonymous_bytes() - before > 60 << 20
        assert abs(machine.anonymous_bytes() - resident()) < 16 << 20


KEEPING = """
import sys
from pathlib import Path
import torch
from qwenq.models.machine import FreedMemory, anonymous_bytes, return_freed_memory

if sys.argv[1] == "keep":
    FreedMemory()
pieces = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(200)]
full = anonymous_bytes()
del pieces
freed = anonymous_bytes()
return_freed_memory()
print((full - freed) >> 20, (full - anonymous_bytes()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("how", "at_once"), [("keep", range(-1, 20)), ("not", range(180, 220))])
def test_freed_memory_is_kept_until_it_is_returned(how: str, at_once: range) -> None:
    done = subprocess.run([sys.executable, "-c", KEEPING, how], capture_output=True, text=True, check=True)
    freed_at_once, in_the_end = map(int, done.stdout.split())  # a page more is -1
    assert freed_at_once in at_once
    assert in_the_end > 180
