"""Read benchmarks from files, whole and every value as text, and from the hub; errors name their place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from qwenq import stopping
from qwenq.errors import DataError
from qwenq.models.hub import network_errors

LARGEST = 64_000_000  # bytes
AnyPath = Path | zipfile.Path
"""The path of a file, or of a member of a zip archive."""
_AGAIN = "get the file again"


class Row(NamedTuple):
    """A row of a benchmark file, and its place: the file and its first line, or the hub's data set.

    Values of CSV files are text exactly as in the file: ``None`` and ``007``, too.
    """

    data: Any
    where: str

    @property
    def file(self) -> str:
        """Return the place without line or row."""
        return self.where.rpartition(", ")[0] or self.where


def read_csv(path: AnyPath, columns: Sequence[str], *, header: bool) -> list[Row]:
    """Return the rows of a CSV file; every value is text.

    Args:
        path: UTF-8, with or without a byte-order mark.
        columns: their names, in order where the file has no header; a file with one may have more.
        header: whether the first line has to name the columns; if not, it may, as some copies have one.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    names, rows = list(columns), list[Row]()
    line, first = 0, True  # of the record before: a quoted value may span lines
    try:
        for values in reader:
            where, line = f"{path}, line {line + 1}", reader.line_num
            if first and (header or _names_columns(values, columns)):
                names = _header(values, columns, where)
            elif values:
                if len(values) != len(names):
                    raise DataError(
                        f"{len(values)} columns where there should be {len(names)}",
                        where=where,
                        hint=f"the columns are {', '.join(names)}",
                    )
                rows.append(Row(dict(zip(names, values, strict=True)), where))
            first = False
    except csv.Error as error:
        raise DataError(f"not a whole CSV file: {error}", where=f"{path}, line {line + 1}") from error
    return _some(rows, path)


def read_records(path: AnyPath) -> list[Row]:
    """Return the values of a .jsonl, .jsonl.gz or .json file, or of all .json files of a folder.

    The latter are in the order of their numbers, and have the file's name as a further column, ``file``.
    """
    if not path.is_dir():
        return _records(path)
    files = [file for file in path.iterdir() if file.name.endswith(".json")]
    files.sort(key=lambda file: [*map(int, re.findall(r"\d+", file.name)), 0])
    rows = [(file.name.removesuffix(".json"), row) for file in files for row in _records(file)]
    named = [
        row._replace(data={**row.data, "file": name}) if isinstance(row.data, dict) else row
        for name, row in rows
    ]
    return _some(named, path)


def _records(path: AnyPath) -> list[Row]:
    text = read_text(path)
    if path.name.endswith(".json"):
        content = _parsed(text, str(path), "the file")
        return numbered(content, str(path)) if isinstance(content, list) else [Row(content, str(path))]
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return _some(
        [Row(_parsed(line, where, "this line"), where) for where, line in lines if line.strip()], path
    )


def numbered(records: object, where: str) -> list[Row]:
    """Return each of a list of records with its place."""
    if not isinstance(records, list) or not records:
        raise DataError("there should be a list of rows", where=where, hint=_AGAIN)
    return [Row(record, f"{where}, row {number}") for number, record in enumerate(records, 1)]


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not valid JSON: {error}", where=where) from error


def text_columns(row: Row, columns: Sequence[str]) -> dict[str, str]:
    """Return these columns of a row; all have to be text."""
    record, where = row
    if not isinstance(record, dict):
        what = f"a row has to be an object with named columns, not {type(record).__name__}"
        raise DataError(what, where=where)
    if missing := [name for name in columns if name not in record]:
        what, hint = f"no column {', '.join(missing)}", f"the columns are {', '.join(columns)}"
        raise DataError(what, where=where, hint=hint)
    if wrong := [name for name in columns if not isinstance(record[name], str)]:
        raise DataError(f"column {', '.join(wrong)} is not text", where=where)
    return {name: record[name] for name in columns}


def require_text(text: str, what: str, where: str) -> None:
    """Refuse a text without a visible character."""
    if not text.strip():
        raise DataError(f"the {what} is empty", where=where)


def check_count(found: int, expected: int, where: object, *, more: bool = False) -> None:
    """Refuse a set without its published rows (or ``more``): its score would be another benchmark's."""
    if found != expected and not (more and found > expected):
        raise DataError(
            f"{found} rows where the published set has {expected}{' or more' if more else ''}",
            where=str(where),
            hint="get the file again; --limit N evaluates the first N items of a whole set",
        )


def _names_columns(values: Sequence[str], columns: Sequence[str]) -> bool:
    """Return whether a first row is a header: the columns' names, or their numbers as pandas writes them."""
    folded = {value.strip().casefold() for value in values}
    numbers = [str(number) for number in range(len(columns))]
    return folded >= {name.casefold() for name in columns} or [v.strip() for v in values] in (
        numbers,
        ["", *numbers],
    )


def _header(header: Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    """Return the names of a header's columns, known ones in our spelling; each of these has to be there."""
    known = {name.casefold(): name for name in columns} | {str(n): name for n, name in enumerate(columns)}
    names = [known.get(name.strip().casefold(), name.strip()) for name in header]
    if any(names.count(name) != 1 for name in columns):
        raise DataError(
            f"the columns are {', '.join(names)}", where=where, hint=f"they should be {', '.join(columns)}"
        )
    return names


def read_text(path: AnyPath) -> str:
    """Return the text of a file; the largest benchmark file has 5 MB."""
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise DataError("it is not a file", where=str(path), hint="put the original file in its place")
    try:
        raw = _bounded(path)
    except FileNotFoundError:
        raise DataError("no such benchmark file", where=str(path), hint=_siblings(path)) from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        kind = "zip archive" if isinstance(path, zipfile.Path) else "gzip file"
        raise DataError(f"not a whole {kind}: {error}", where=str(path), hint="copy it again") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except RuntimeError as error:  # zipfile's, of members that are encrypted or packed in a way of their own
        raise DataError(
            f"cannot be unpacked: {error}", where=str(path), hint="get the archive again"
        ) from error
    if b"\0" in raw:
        raise DataError(
            "it holds zero (NUL) bytes: probably UTF-16, or not a text",
            where=str(path),
            hint=f"convert it, e.g. `iconv -f UTF-16LE -t UTF-8 {path.name}`",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x}",
            where=f"{path}, line {line}",
            hint=f"convert it, e.g. `iconv -f GB18030 -t UTF-8 {path.name}`",
        ) from error


def _bounded(path: AnyPath) -> bytes:
    """Return the bytes, inflated up to a bound: a compressed file may be a thousand times as large."""
    packed = path.suffix == ".gz"
    with path.open("rb") as stored, gzip.open(stored) if packed else nullcontext(stored) as file:
        raw: bytes = file.read(LARGEST + 1)
    if len(raw) > LARGEST:
        raise DataError(
            f"over {LARGEST // 1_000_000} MB when inflated: no benchmark file is that large",
            where=str(path),
            hint="get the file again",
        )
    return raw


def _siblings(path: AnyPath) -> str:
    folder = path.parent
    if not folder.is_dir():  # type: ignore[attr-defined]
        return f"there is no folder {folder.name}/"  # type: ignore[attr-defined]
    there = sorted(entry.name for entry in folder.iterdir())  # type: ignore[attr-defined]
    shown = f"{', '.join(there[:8])}{' …' * (len(there) > 8)}"
    return f"the folder holds {shown}" if there else "the folder is empty"


def _some(rows: list[Row], path: object) -> list[Row]:
    if not rows:
        raise DataError("the file is empty", where=str(path), hint="get it again")
    return rows


# Read data sets of the hub that load without remote code, their copies, or single files.


_WAYS = (
    "either connect to the hub, or put the files into a folder and name it: --data DIR; for a try, --sample "
    "has a few questions in the form of mmlu, ceval, gsm8k and humaneval"
)
_TIMEOUT = 10.0  # seconds


def read_hub(dataset: str, config: str | None, split: str, *, copy: Path | None) -> list[dict[str, Any]]:
    """Return all rows of one split, in its order, through the ``datasets`` library.

    Args:
        dataset: ``owner/name``; not one with a script (since datasets 4).
        config: one of its configurations; None where it has only one.
        split: such as ``test``.
        copy: a folder with the set's parquet files, as downloaded; None: the hub.
    """
    if copy is not None:
        return _read_copy(copy, config, split)
    import datasets

    where = f"hub dataset {dataset}{f', {config}' if config else ''}, split {split}"
    # What it raises where a set is unreachable, missing, refused, damaged or not as declared.
    own = getattr(getattr(datasets, "exceptions", None), "DatasetsError", OSError)
    try:
        with _from_the_cache(datasets, why=_unreachable(dataset)):
            rows: Iterable[Any] = datasets.load_dataset(dataset, config, split=split)
            listed = [dict(row) for row in rows]
    except (OSError, ValueError, RuntimeError, KeyError, own, *network_errors()) as error:
        raise _no_benchmark(error, where) from error
    if not listed:
        raise DataError("the hub returned no rows", where=where, hint=_WAYS)
    return listed


def _read_copy(folder: Path, config: str | None, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split from parquet files that lie as on the hub."""
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    for file in _copied_files(folder, config, split):
        if file.stat().st_size > LARGEST:
            raise DataError(f"over {LARGEST // 1_000_000} MB: no benchmark file is that large", where=file)
        try:
            rows += parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"not a whole parquet file: {error}", where=file, hint="copy it again") from error
    if not rows:
        raise DataError("the parquet files hold no rows", where=folder, hint="download them again")
    return rows


def _copied_files(folder: Path, config: str | None, split: str) -> list[Path]:
    inside = [(file, file.relative_to(folder).parts) for file in sorted(folder.rglob("*.parquet"))]
    of_config = [(file, parts) for file, parts in inside if config in parts]
    if not of_config and (config == "all" or len({parts[:-1] for _, parts in inside}) == 1):
        of_config = inside  # downloaded alone, without its folder; or all of them one by one
    named = re.compile(rf"(?:.*[-_.])?{re.escape(split)}(?:[-_.].*)?")
    files = [
        file
        for file, parts in (inside if config is None else of_config)
        if split in parts[:-1] or named.fullmatch(parts[-1].removesuffix(".parquet"))
    ]
    if not files:
        names = ", ".join("/".join(parts) for _, parts in inside[:5])
        raise DataError(
            f"no parquet file of the split {split}{f' of {config}' if config else ''}",
            where=folder,
            hint=f"it should be called {config or 'data'}/{split}-00000-of-00001.parquet; there are {names}",
        )
    return files


def fetch_hub_file(dataset: str, name: str) -> Path:
    """Return one file of a hub dataset, downloaded or from the cache; errors as `read_hub`'s."""
    from huggingface_hub import hf_hub_download

    where = f"hub dataset {dataset}, {name}"
    why = _unreachable(dataset)
    broken: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *network_errors())
    try:
        found = hf_hub_download(dataset, name, repo_type="dataset", local_files_only=why is not None)
    except broken as error:
        raise _no_benchmark(why or error, where) from error
    return Path(found)


def _no_benchmark(error: Exception, where: str) -> BaseException:
    """Return the error to raise; a stop (SIGTERM) behind it comes first."""
    if (stop := stopping.behind(error)) is not None:
        return stop
    hidden = type(error).__name__ == "DatasetGenerationError"  # its text lacks the reason
    found = error.__cause__ if hidden and error.__cause__ is not None else error
    reason = str(found).strip().splitlines() or [type(found).__name__]
    return DataError(f"the benchmark could not be loaded from the hub: {reason[0]}", where=where, hint=_WAYS)


class _UnreachableError(OSError):
    """The hub did not answer."""


@cache
def _unreachable(dataset: str) -> _UnreachableError | None:
    """Return why the hub is unreachable; None when it is reachable, or in offline mode.

    This comes first, once: an unreachable download is retried six times, in half a minute and eleven lines.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        return None
    broken: tuple[type[Exception], ...] = (OSError, *network_errors())
    try:
        HfApi().dataset_info(dataset, timeout=_TIMEOUT)
    except HfHubHTTPError:
        return None  # it answers; the download has the better error
    except broken as error:
        return _UnreachableError(f"{constants.ENDPOINT} could not be reached: {error}")
    return None


@contextmanager
def _from_the_cache(datasets: Any, *, why: _UnreachableError | None) -> Iterator[None]:
    """Make ``datasets`` use its cache at once where the hub is unreachable."""
    if why is None:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        raise why from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
