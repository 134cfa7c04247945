"""Limits of control groups, as files that look like Linux' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwenq.models import machine
from qwenq.models.machine import cgroup_memory_left, free_memory

NAMES = {2: ("memory.max", "memory.current"), 1: ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def write_group(folder: Path, version: int, limit: str, used: int, files: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(NAMES[version], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon {used - files}\nactive_file {files}\ninactive_file 7\n")


@pytest.mark.parametrize(("version", "line", "root"), [(2, "0::/a/b", ""), (1, "4:memory:/a/b", "memory")])
def test_the_nearest_limit_counts_and_pages_of_files_are_free(
    tmp_path: Path, version: int, line: str, root: str
) -> None:
    groups, mounted = tmp_path / "groups", tmp_path / "mounted"
    groups.write_text(f"9:name=systemd:/\n3:cpuset:/a\n{line}\n")
    assert cgroup_memory_left(groups, mounted) is None
    write_group(mounted / root / "a", version, "1000", 300, files=100)
    assert cgroup_memory_left(groups, mounted) == 1000 - 300 + 100 + 7
    write_group(mounted / root / "a" / "b", version, "500", 450)
    assert cgroup_memory_left(groups, mounted) == 57
    write_group(mounted / root / "a" / "b", version, "max", 450)
    write_group(mounted / root, version, "9000", 8999)
    assert cgroup_memory_left(groups, mounted) == 8


@pytest.mark.parametrize("content", ["", "garbage", "0::\n", "4:memory\n", "0::/../../etc\n"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, content: str) -> None:
    (tmp_path / "groups").write_text(content)
    assert cgroup_memory_left(tmp_path / "groups", tmp_path / "mounted") is None
    assert cgroup_memory_left(tmp_path / "none", tmp_path / "mounted") is None


def test_what_is_free_is_no_more_than_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_memory_left", lambda: 1000)
    assert free_memory() == 1000
    monkeypatch.setattr(machine, "cgroup_memory_left", lambda: None)
    assert free_memory() > 1000
