from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import stat
from pathlib import Path
from typing import IO, Any

import pytest

from qwenq.errors import StorageError, UsageError
from qwenq.storage import (
    atomic_write_bytes,
    atomic_write_json,
    cache_folder,
    fsync_folder,
    guard_storage,
    held,
    locked,
    readable_bytes,
    require_space,
    sha256_file,
)


def test_writes_appear_whole_and_leave_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    atomic_write_bytes(path, b"old")
    atomic_write_bytes(path, b"new" * 1000)
    assert path.read_bytes() == b"new" * 1000
    assert list(path.parent.iterdir()) == [path]


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o027)
    try:
        atomic_write_bytes(path, b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def _write_often(path: Path, letter: str) -> None:
    for _ in range(30):
        atomic_write_bytes(path, letter.encode() * 100_000)


def test_two_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert data in (b"a" * 100_000, b"b" * 100_000)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_utf8_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    atomic_write_json(path, {"语": [1, 2]})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert json.loads(path.read_text(encoding="utf-8")) == {"语": [1, 2]}
    with pytest.raises(ValueError):
        atomic_write_json(path, float("nan"))
    assert json.loads(path.read_text(encoding="utf-8")) == {"语": [1, 2]}


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 999_999)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 999_999).hexdigest()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"disk is full: 15\.4 GB needed, .* free") as caught,
        guard_storage(tmp_path, 15_442_649_088),
        Path("/dev/full").open("wb") as file,
    ):
        file.write(b"x" * 100_000)
    assert "same command" in str(caught.value.hint)


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        atomic_write_bytes(tmp_path / "file" / "inside", b"")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may not be written"),
        (errno.EIO, "reports an error"),
        (errno.ENOENT, "is gone"),
        (errno.ESTALE, "is gone"),
        (errno.ENOTCONN, "is gone"),
        (errno.EDQUOT, "the disk is full"),
    ],
)
def test_refusing_disks_are_explained(tmp_path: Path, number: int, says: str) -> None:
    with pytest.raises(StorageError, match=says) as caught, guard_storage(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "shard"))
    assert str(tmp_path) in str(caught.value) and caught.value.exit_code == 1


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), guard_storage(tmp_path):
        tmp_path.read_bytes()


def test_too_little_space_is_refused_beforehand(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet" / "made", 1)
    with pytest.raises(StorageError, match=r"1000000\.0 TB needed, .* free"):
        require_space(tmp_path, 10**18)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (15_442_649_088, "15.4 GB"), (2.5e15, "2500.0 TB")]
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert readable_bytes(count) == text


def test_the_cache_goes_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QWENQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qwenq"
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("QWENQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert "qwenq" in cache_folder().parts


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run), pytest.raises(UsageError, match="another qwenq is working"), locked(run):
        pass
    with locked(run):
        pass


def test_a_disk_without_locks_is_not_called_another_qwenq(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    with held(tmp_path):  # where nothing has locks, nobody is kept out
        pass
    said = r"(?s)refused a lock: No locks available.*another disk"
    with pytest.raises(StorageError, match=said), locked(tmp_path):
        pass


def test_a_disk_without_locks_of_folders_keeps_a_second_one_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NFS locks a folder by a lock of its bytes, for which it would have to be open for writing."""
    flock = fcntl.flock

    def of_files_alone(handle: int | IO[str], how: int) -> None:
        if stat.S_ISDIR(os.fstat(handle if isinstance(handle, int) else handle.fileno()).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", of_files_alone)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "report"
    for _ in range(2):
        with held(out), pytest.raises(UsageError, match=f"(?s)another qwenq.*{out}"), held(out):
            pass
        with held(tmp_path / "another"):
            pass
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_that_flushes_files_alone_is_written_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    fsync = os.fsync

    def of_files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    atomic_write_bytes(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_folder_that_fails_to_be_flushed_is_no_such_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        fsync_folder(tmp_path)


def test_a_folder_that_may_be_written_and_not_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = os.open

    def refuse(path: Path, *rest: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    atomic_write_bytes(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_name_that_is_too_long_while_it_is_written_is_said(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 236 + ".safetensors")
    path.touch()  # as such the disk takes it
    with pytest.raises(StorageError, match=r"(?s)name is too long.*name a shorter one"):
        atomic_write_bytes(path, b"")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWENQ_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1_999_999_999)  # as a container may have it
    with pytest.raises(UsageError, match=r"(?s)no folder for a cache.*set QWENQ_CACHE"):
        cache_folder()
