"""Refuse links out of a model folder, and what is no plain file.

What is copied beside a quantised model (licences, tokenizers) would otherwise carry a private file along, to
wherever the result is uploaded: `LICENSE` need only be a link to it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from qwenq.errors import CorruptFileError, ModelError
from qwenq.storage import readable_bytes

_TEMPLATES = "additional_chat_templates"
_READ_WHOLE = {".json", ".jinja", ".txt", ".tiktoken", ".model", ".py"}
LARGEST = 100_000_000
"""Bytes of a file that is read whole, by us or by transformers. The largest tokenizers have 35 MB.
A file with holes can claim terabytes at no cost."""


def require_own_files(folder: Path) -> None:
    """Refuse links that lead out of the folder, and what is no file at all (pipes, devices).

    Files that are read whole may be no larger than ``LARGEST``.

    The hub's cache is made of links, into ``blobs`` beside ``snapshots``: those count as the folder's own.
    """
    if not folder.is_dir():
        return  # reading it raises the error
    try:
        root = folder.resolve(strict=True)
        homes = (root, *_hub_blobs(root))
        for entry in _entries(root):
            _check(entry, homes)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ModelError(f"the folder cannot be read: {error}", where=folder) from error


def _entries(root: Path) -> Iterator[Path]:
    yield from root.iterdir()
    if (root / _TEMPLATES).is_dir():
        yield from (root / _TEMPLATES).iterdir()


def _hub_blobs(root: Path) -> tuple[Path, ...]:
    """Return ``models--owner--name/blobs`` of ``models--owner--name/snapshots/commit``."""
    repository = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return (repository / "blobs",) if is_snapshot else ()


def _check(entry: Path, homes: tuple[Path, ...]) -> None:
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
    size = entry.stat().st_size if entry.suffix in _READ_WHOLE and entry.is_file() else 0
    if size > LARGEST:
        raise CorruptFileError(
            f"{entry.name} has {readable_bytes(size)} to be read whole; no model's file has so many",
            where=entry,
            hint="download it again, or do not use this model",
        )
