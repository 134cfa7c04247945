"""Check paths and folders before they are read or written: names, links, manifests, renames."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import psutil

from qwenq.errors import CorruptFileError, ModelError, UsageError
from qwenq.storage import fsync_folder, guard_storage, held, readable_bytes


def local_path(text: str | Path, what: str) -> Path:
    """Return the path, ``~`` expanded, of what was typed for ``what``; nothing need be there."""
    require_utf8(text, what)
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: ~nobody
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{what} cannot be looked for: {why}",
            where=str(text),
            hint="check its spelling and permissions",
        ) from error
    return path


def require_utf8(path: str | Path, what: str) -> None:
    """Refuse a name that JSON cannot hold and the safetensors library cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the name of {what} is not UTF-8: neither JSON nor the safetensors library takes it",
            where=path,
            hint="rename that folder or file",
        ) from error


# Refuse links out of a model folder, and what is no plain file.
#
# What is copied beside a quantised model (licences, tokenizers) would otherwise carry a private file along,
# to wherever the result is uploaded: `LICENSE` need only be a link to it.


_TEMPLATES = "additional_chat_templates"
_READ_WHOLE = {".json", ".jinja", ".txt", ".tiktoken", ".model", ".py"}
LARGEST = 100_000_000
"""Bytes of a file that is read whole, by us or by transformers. The largest tokenizers have 35 MB.
A file with holes can claim terabytes at no cost."""


def refuse_foreign_links(folder: Path) -> None:
    """Refuse links that lead out of the folder, and what is no file at all (pipes, devices).

    Files that are read whole may be no larger than ``LARGEST``.

    The hub's cache is made of links, into ``blobs`` beside ``snapshots``: those count as the folder's own.
    """
    if not folder.is_dir():
        return  # reading it raises the error
    try:
        root = folder.resolve(strict=True)
        repository = hub_repository(root)
        homes = [root] if repository is None else [root, repository / "blobs"]
        templates = root / _TEMPLATES
        for entry in (*root.iterdir(), *(templates.iterdir() if templates.is_dir() else ())):
            _check(entry, homes)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ModelError(f"the folder cannot be read: {error}", where=folder) from error


def hub_repository(folder: Path) -> Path | None:
    """Return ``models--owner--name`` of its snapshot in the hub's cache; None: the folder is none."""
    repository = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if is_snapshot else None


def _check(entry: Path, homes: list[Path]) -> None:
    mode = entry.lstat().st_mode
    if stat.S_ISLNK(mode):
        target = entry.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise CorruptFileError(
                f"{entry.name} is a link that leads out of the model folder",
                where=entry,
                hint="replace it by the file itself (or by a hard link), if you trust where it leads",
            )
        mode = target.lstat().st_mode if target.exists() else stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorruptFileError(
            f"{entry.name} is neither a file nor a folder", where=entry, hint="remove it from the folder"
        )
    if entry.suffix in _READ_WHOLE and entry.is_file():
        refuse_large(entry)


def refuse_large(file: Path) -> None:
    """Refuse a file that is read whole if it has more than ``LARGEST`` bytes."""
    if (size := file.stat().st_size) > LARGEST:
        raise CorruptFileError(
            f"{file.name} has {readable_bytes(size)} to be read whole; no model's file has so many",
            where=file,
            hint="download it again, or do not use this model",
        )


_LONGER = "." * 24  # what work folders have in their names besides


def require_renameable(target: Path, option: str) -> None:
    """Refuse a name, given by ``option``, that no finished folder can take, before any work is done."""
    require_utf8(target, option)
    if target.name == "..":
        raise UsageError(
            "this does not name a new folder", where=target, hint=f"name a new folder, such as {option} model"
        )
    try:
        os.lstat(target.parent / f"{target.name}{_LONGER}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(
                "the name is too long for this disk", where=target, hint=f"name a shorter one: {option} NAME"
            ) from error
    if target.is_symlink():
        raise UsageError(
            "this is a link; a finished folder is renamed to what you named, and cannot replace a link",
            where=target,
            hint=f"name what it leads to: {option} {target.resolve()}",
        )
    if os.path.ismount(target):
        raise UsageError(
            "a disk is mounted here; a finished folder is renamed to what you named, and cannot replace that",
            where=target,
            hint=f"name a new folder on it, such as {option} {target / 'model'}",
        )


def take_name(made: Path, target: Path) -> None:
    """Give a finished folder its name, which an empty folder may have."""
    try:
        os.replace(made, target)  # noqa: PTH105  Path.replace refuses an empty folder on some systems
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UsageError(
            "something has been put there since this run began",
            where=target,
            hint="move it away, then run the same command again",
        ) from error


@contextmanager
def new_folder(target: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a sibling folder that gets the target's name at the end; remove it on an error.

    ``needed`` are the bytes that will be written, if that is known.
    """
    place = target.absolute()
    # Processes of several machines or containers may have one number.
    temporary = place.with_name(f".{place.name}.{token_hex(4)}.{os.getpid()}.tmp")
    with guard_storage(target, needed):
        _remove_left_behind(place)
        temporary.mkdir(parents=True)
        try:
            with held(temporary):
                yield temporary
                take_name(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync_folder(place.parent)


def _remove_left_behind(place: Path) -> None:
    """Remove what killed processes left of this name: their process is gone, their lock free."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):
        process = left.suffixes[-2].removeprefix(".")
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            with suppress(UsageError), held(left):  # held: by a process of another machine
                shutil.rmtree(left, ignore_errors=True)


MANIFEST = "qwenq.json"
CARD, CARD_PLOTS = "README.md", "plots"
"""The model card, and the folder of the plots that it shows: renewed by reports, edited by people."""
PARTIAL, STAGED, RUN = ".partial", "checkpoint", "run.json"
"""`qwenq quantize` stages what it has not checked yet in ``OUT.partial/checkpoint``, beside ``run.json``,
which says what the run is."""


def missing_manifest(folder: Path) -> list[str]:
    """Return a notice on quantised weights without a manifest; empty where there is one."""
    if (folder / MANIFEST).is_file():
        return []
    real = folder.resolve()
    if real.name == STAGED and real.parent.name.endswith(PARTIAL) and (real.parent / RUN).is_file():
        raise ModelError(
            "this quantised model is unfinished: it was never checked",
            where=folder,
            hint="run the same `qwenq quantize` command again: it resumes, and checks what it wrote",
        )
    return [f"no {MANIFEST}: not written by `qwenq quantize`, or unfinished; its files are not verified"]
