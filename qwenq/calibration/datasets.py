"""Read data sets as streams of documents: from the hub, from folders, saved or downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from qwenq import stopping
from qwenq.calibration.documents import Document, from_record
from qwenq.calibration.files import ACCEPTED, JSONS, TABLES, TEXTS, bare_suffix, read_file
from qwenq.errors import CalibrationError, HubError, QwenqError, UsageError

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_OTHERWISE = "download the file, repair it and give its path; or name another dataset"
_WITHOUT_HUB = "without a network: name self, or download the file elsewhere and give its path"


def is_hub_id(spec: str) -> bool:
    """Return whether ``spec`` is spelt ``owner/name`` or ``owner/name:config``."""
    return _HUB_ID.fullmatch(spec) is not None


def read_hub(spec: str, split: str | None = None, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of a hub dataset, streamed, in the dataset's order.

    Args:
        spec: ``owner/name``, or ``owner/name:config`` for a dataset that has several.
        split: None means ``train``.
        column: None takes the first of text, messages, conversations.

    Raises:
        UsageError: ``datasets`` is not installed; no such split, config or column.
        HubError: the hub could not be reached, or has no such dataset.
        CalibrationError: its files are damaged, or of a form that ``datasets`` does not read; names the row.
    """
    split = split or "train"
    stream = _open(spec, split)
    where = f"{spec}, split {split}"
    number = 0
    try:
        for record in stream:
            number += 1
            document = from_record(record, f"{where}, row {number}", column)
            if not document.blank:
                yield document
    except (MemoryError, QwenqError):
        raise
    except (ConnectionError, OSError) as error:
        raise HubError(
            f"reading the dataset broke off: {error}", where=f"{where}, row {number + 1}", hint=_WITHOUT_HUB
        ) from error
    except Exception as error:  # ValueError, EOFError, pyarrow's, the library's own: there is no common class
        raise unreadable(error, f"{where}, after row {number}", _OTHERWISE) from error


def _open(spec: str, split: str) -> Iterable[Any]:
    parts = _HUB_ID.fullmatch(spec)
    if parts is None:
        raise UsageError("not a dataset id", where=spec, hint="write owner/name or owner/name:config")
    import datasets

    try:
        stream: Iterable[Any] = datasets.load_dataset(
            parts["name"], parts["config"], split=split, streaming=True
        )
        return stream
    except ValueError as error:  # unknown split or config: the library's message lists those there are
        raise UsageError(
            f"the dataset has no such split or config: {error}",
            where=f"{spec}, split {split}",
            hint="name the split (--split of `qwenq calibrate`, split in a recipe), or owner/name:config",
        ) from error
    except (ConnectionError, OSError) as error:  # offline, unreachable, not found, gated
        raise HubError(f"cannot open the dataset: {error}", where=spec, hint=_WITHOUT_HUB) from error
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError: the dataset's script would have to be run
        raise unreadable(error, spec, _OTHERWISE) from error


def unreadable(error: Exception, where: Path | str, hint: str) -> BaseException:
    """Return the error to raise where ``datasets`` fails: the stop that caused it, if one did."""
    if (stop := stopping.behind(error)) is not None:
        return stop
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    return CalibrationError(f"the dataset cannot be read: {reason}", where=where, hint=hint)


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
    import datasets

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
