"""Measure the memory that this process may still take, by the machine and its control groups.

Control groups, versions 1 and 2: cgroup-v1/memory.rst and cgroup-v2.rst of Linux' admin guide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_GROUPS, _MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use, of version 2 and of version 1."""


def free_memory() -> int:
    """Return the bytes that this process can still take: available memory, within the cgroup limit."""
    available, granted = int(psutil.virtual_memory().available), granted_bytes()
    return available if granted is None else min(available, granted)


def granted_bytes(groups: Path = _GROUPS, mounted: Path = _MOUNTED) -> int | None:
    """Return the bytes up to the nearest cgroup limit, page cache not counted as used; None: no limit.

    Args:
        groups: the groups of this process, as Linux lists them.
        mounted: where control groups are mounted.
    """
    left = [free for folder in _folders(groups, mounted) if (free := _free(folder)) is not None]
    return min(left, default=None)


def _folders(groups: Path, mounted: Path) -> Iterator[Path]:
    """Yield the process's group and those around it; in a container the path may be the host's."""
    lines: list[str] = []
    with suppress(OSError):
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers not in ("", "memory"):
            continue
        root = mounted / controllers
        own = root / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def _free(folder: Path) -> int | None:
    for limit, used in _FILES:
        with suppress(OSError, ValueError):  # "max" is no number
            most = int((folder / limit).read_text(encoding="ascii"))
            return max(0, most - int((folder / used).read_text(encoding="ascii")) + _pages_of_files(folder))
    return None


def _pages_of_files(folder: Path) -> int:
    """Return the bytes of page cache, which Linux drops before it ends a process."""
    lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    counts = dict(line.split(" ", 1) for line in lines)
    return sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
