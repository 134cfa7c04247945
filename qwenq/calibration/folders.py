"""Read folders as streams of documents: saved or downloaded data sets, and folders of text files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qwenq.calibration.content import bare_suffix
from qwenq.calibration.documents import Document, from_record
from qwenq.calibration.files import ACCEPTED, JSONS, TABLES, TEXTS, read_file
from qwenq.calibration.hub_source import unreadable
from qwenq.errors import UsageError

_KINDS: tuple[set[str], ...] = ({".parquet"}, JSONS, set(TABLES), TEXTS - {""})
"""Suffixes that belong together, best first: a repository's README is no data beside its tables."""
_ABOUT = re.compile(
    r"(?i)(readme|license|licence|notice|changelog|dataset_infos?|dataset_dict|state|metadata)\b.*"
)
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_SPLIT = re.compile(rf"(?:^|[/_.-])({'|'.join(_SPLITS)})(?=[/_.-]|$)")


def read_folder(folder: Path, split: str | None = None, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of a folder, file by file in the order of their names; blank ones are left out.

    Args:
        folder: made by ``save_to_disk``, a copy of a data set's repository, or any folder of text files.
        split: of a folder whose files or parts are named after splits; None: train.
        column: as in ``read_file``.

    Raises:
        UsageError: nothing in it is read here, or there is no such split.
        CalibrationError: a file is damaged.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved(folder, split, column)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        raise UsageError("it is a model's folder, not a text", where=folder, hint="name a folder of texts")
    files = _of_split(_files(folder), folder, split)
    return chain.from_iterable(read_file(file, column) for file in files)


def _files(folder: Path) -> list[Path]:
    inside = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not _ABOUT.fullmatch(path.name)
    ]
    for kind in _KINDS:
        if found := [path for path in inside if bare_suffix(path) in kind]:
            return found
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise UsageError(
        "no text file in this folder", where=folder, hint=f"accepted: {ACCEPTED}; it holds {names}"
    )


def _of_split(files: list[Path], folder: Path, split: str | None) -> list[Path]:
    """Return the files of one split, by their names; all of them where none is named after a split."""
    named = {path: _SPLIT.search(path.relative_to(folder).as_posix()) for path in files}
    there = sorted({found[1] for found in named.values() if found})
    if split is None and (not there or there == ["test"]):
        return files
    wanted = split or "train"
    if chosen := [path for path, found in named.items() if found and found[1] == wanted]:
        return chosen
    raise UsageError(
        f"no file of the split {wanted!r} in this folder",
        where=folder,
        hint=f"--split: {', '.join(there)}" if there else "its files are of no split: leave the split out",
    )


def _saved(folder: Path, split: str | None, column: str | None) -> Iterator[Document]:
    """Yield the rows of what the ``datasets`` library's ``save_to_disk`` made."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "a folder of save_to_disk needs the package datasets",
            where=folder,
            hint="pip install 'qwenq[data]'",
        ) from None
    try:
        loaded: Any = datasets.load_from_disk(str(folder))
    except MemoryError:
        raise
    except Exception as error:  # ValueError, pyarrow's, KeyError: there is no common class
        raise unreadable(error, folder, "save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
        if wanted not in loaded:
            raise UsageError(
                f"this data set has no split {wanted!r}", where=folder, hint=f"--split: {', '.join(loaded)}"
            )
        loaded = loaded[wanted]
    elif split is not None:
        raise UsageError("this data set has no splits", where=folder, hint="leave the split out")
    return _rows(loaded, folder, column)


def _rows(rows: Any, folder: Path, column: str | None) -> Iterator[Document]:
    for number in range(len(rows)):
        try:
            record = rows[number]
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise unreadable(error, folder, "save it again") from error
        document = from_record(record, f"{folder}, row {number + 1}", column)
        if not document.blank:
            yield document
