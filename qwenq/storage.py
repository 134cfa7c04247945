"""Write without losing data: atomic files, flushed folders, locks, and errors of full or failing disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from qwenq.errors import CorruptFileError, QwenqError, StorageError, UsageError

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error
_REASONS = {
    errno.EROFS: "is on a read-only disk",
    errno.EACCES: "may not be written",
    errno.EPERM: "may not be written",
    errno.EFBIG: "grew larger than this file system or a limit of this process allows",
    errno.EIO: "cannot be written: the disk reports an error",
    errno.ENOTDIR: "lies below a file, not a folder",
    errno.EEXIST: "is a file where a folder has to be",
}
_GONE = {  # unmounted, pulled out, a server that went away; some systems lack some of these
    getattr(errno, name, errno.ENOENT)
    for name in ("ENOENT", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ETIMEDOUT", "EREMOTEIO")
}
_NOT_OF_FOLDERS = {
    getattr(errno, name, errno.EINVAL) for name in ("EINVAL", "EBADF", "ENOTSUP", "EOPNOTSUPP", "ENOSYS")
}
_UNITS = ("B", "KB", "MB", "GB", "TB")


def readable_bytes(count: float) -> str:
    """Return a size for people, in powers of 1000: ``15_442_649_088`` is ``15.4 GB``."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the disk of ``path`` or its nearest existing parent; None if unknown."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


@contextmanager
def guard_storage(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the errors of a full, read-only, forbidden, failing or vanished disk into ``StorageError``.

    Other errors pass. ``path`` is being written, with ``needed`` bytes in the whole job, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            sizes = {"needed": needed, "free": free_bytes(path)}
            facts = [f"{readable_bytes(size)} {name}" for name, size in sizes.items() if size is not None]
            raise StorageError(
                f"the disk is full{': ' if facts else ''}{', '.join(facts)}",
                where=path,
                hint="free some space or name another folder, then run the same command again",
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            what = "the name is too long for this disk"
            raise StorageError(what, where=path, hint="name a shorter one") from error
        if error.errno in _GONE:
            raise StorageError(
                f"{error.filename or path} is gone: was its disk unmounted, or the folder removed?",
                where=path,
                hint="mount it again, then run the same command again",
            ) from error
        if reason := _REASONS.get(error.errno or 0):
            raise StorageError(
                f"{error.filename or path} {reason}", where=path, hint="name a folder that you may write to"
            ) from error
        raise


def require_space(path: Path, needed: int) -> None:
    """Refuse before the first byte is written when the disk of ``path`` cannot hold ``needed`` bytes."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise StorageError(
            f"not enough space: {readable_bytes(needed)} needed, {readable_bytes(free)} free",
            where=path,
            hint="free some space or name another folder",
        )


def take_lock(folder: Path, name: str = "lock") -> IO[str]:
    """Take an advisory lock on a folder; the kernel releases it when the process ends, however it ends.

    The file ``name`` in it is locked, and stays; closing what is returned releases the lock.
    """
    with guard_storage(folder):
        handle = (folder / name).open("w")
    try:
        _lock(handle, folder)
    except QwenqError:
        handle.close()
        raise
    return handle


def _lock(handle: IO[str] | int, folder: Path) -> None:
    """Lock what is open, which stands for a folder; do not wait for another process that has it."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = "another qwenq is working in this folder"
        raise UsageError(what, where=folder, hint="wait for it, or name another --out") from error
    except OSError as error:  # some network disks have no locks: then waiting would not help
        raise StorageError(
            f"the disk refused a lock: {error.strerror}", where=folder, hint="name an --out on another disk"
        ) from error


@contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """Lock a folder, made where it is missing, for this process; see ``take_lock``."""
    with guard_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with take_lock(folder, name):
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock as ``locked`` does, but the folder itself: no file is left in a folder that people look at.

    Where the disk cannot lock folders, as NFS, a file in the user's cache is locked instead, which keeps out
    processes that share that cache.
    """
    with guard_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    with ExitStack() as stack:
        stack.callback(os.close, handle)
        try:
            _lock(handle, folder)
        except StorageError:
            _hold_elsewhere(folder, stack)
        yield


def _hold_elsewhere(folder: Path, stack: ExitStack) -> None:
    """Lock a file in the user's cache that stands for a folder; without locks there, lock nothing."""
    locks, name = cache_folder() / "locks", hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    with suppress(StorageError):
        try:
            stack.enter_context(locked(locks, name))
        except UsageError as error:
            error.where = str(folder)
            raise


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut.

    Does nothing where folders cannot be flushed: network disks, and folders that may not be listed.
    """
    if sys.platform == "win32":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_OF_FOLDERS:
            raise
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Flush a finished file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets the name ``path`` at the end, once it is on the disk; remove it on an error."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part, even after a power cut."""
    with guard_storage(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            file.write(data)
        fsync_folder(path.parent)


def atomic_write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write UTF-8 JSON with a final newline as ``atomic_write_bytes`` does; refuse NaN, which is not JSON."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, text.encode() + b"\n")


LONGEST_LINE = 64_000_000
"""Bytes; a row of results with 14,000 items has a million. A line without an end would take all memory."""


def append_line(path: Path, line: str) -> None:
    """Add a line of JSON to a file, made where it is missing, and flush it to the disk.

    A last line that a kill cut off is removed first: the new one would become a part of it.
    """
    data = line.encode(errors="replace") + b"\n"  # a command may name any bytes
    with guard_storage(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            size = file.tell()
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":
                file.seek(start := max(0, size - LONGEST_LINE))
                before, end, last = file.read().rpartition(b"\n")
                if start and not end:
                    raise too_long_line(f"{path}, its last line")
                if is_whole_line(last):
                    data = b"\n" + data
                else:
                    file.truncate(start + len(before) + len(end))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def is_whole_line(line: bytes) -> bool:
    """Return whether a line without a line end is a complete object: an editor may have left the end out."""
    try:
        return isinstance(json.loads(line.removeprefix(b"\xef\xbb\xbf")), dict)
    except (ValueError, RecursionError):
        return False


def too_long_line(where: str) -> UsageError:
    """Build the error of a line without an end."""
    what = f"a line of more than {LONGEST_LINE // 1_000_000} MB is not a row of results"
    return UsageError(what, where=where, hint="delete that line")


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read; refuse what is not one, such as a pipe, which might never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return path.open("rb")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path.name} is not JSON: {error}", where=path) from error
    if not isinstance(content, dict):
        raise CorruptFileError(f"{path.name} is not a JSON object", where=path)
    return content


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Return the folder for what qwenq can make again: ``$QWENQ_CACHE``, else the platform's cache folder."""
    try:
        if named := os.environ.get("QWENQ_CACHE"):
            return Path(named).expanduser()
        if xdg := os.environ.get("XDG_CACHE_HOME"):
            return Path(xdg).expanduser() / "qwenq"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "qwenq"
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "qwenq" / "Cache"
        return Path.home() / ".cache" / "qwenq"
    except RuntimeError as error:
        raise UsageError(
            f"no folder for a cache: {error}", where="HOME", hint="set QWENQ_CACHE to a folder of yours"
        ) from error
