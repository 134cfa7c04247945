"""Read benchmark files, and name the file and line of each error."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwenq.errors import DataError
from qwenq.evals.task import DataSource

SAMPLE = Path(__file__).parents[1] / "sample"
"""The suite that ships with qwenq: items written for it, in the benchmarks' layouts."""
LARGEST = 64_000_000  # bytes
T = TypeVar("T")
AnyPath = TypeVar("AnyPath", Path, zipfile.Path)
"""The path of a file, or of a member of a zip archive."""


@dataclass(frozen=True)
class Row:
    """A row of a benchmark file.

    Attributes:
        data: text by column, exactly as in the file: ``None`` and ``007`` are text too.
        where: the file and its first line; or the hub's data set.
    """

    data: dict[str, str]
    where: str


def local_folder(source: DataSource, name: str) -> Path | None:
    """Return the folder of one benchmark; None when the source is the hub.

    Raises:
        DataError: a folder was named that does not hold this benchmark, or the sample suite does not.
    """
    if source.sample:
        if not (SAMPLE / name).is_dir():
            there = sorted(path.name for path in SAMPLE.iterdir() if path.is_dir())
            raise DataError(
                f"the sample suite has no {name}", where="--sample", hint=f"it has {', '.join(there)}"
            )
        return SAMPLE / name
    if source.folder is None:
        return None
    folder = source.folder / name
    if not folder.is_dir():
        raise DataError(
            f"no {name} data there",
            where=folder,
            hint=f"put the original {name} files in a folder {name}/ below --data, "
            "or leave --data out to load them from the hub",
        )
    return folder


def read_csv(
    path: Path | zipfile.Path, columns: Sequence[str], *, header: bool, optional: Sequence[str] = ()
) -> list[Row]:
    """Return the rows of a CSV file; every value is text.

    Args:
        path: UTF-8, with or without a byte-order mark.
        columns: their names, in order where the file has no header.
        header: whether the first line has to name the columns; if not, it may, as some copies have one.
        optional: further columns that the file may have.

    Raises:
        DataError: not there, empty, not UTF-8, not CSV, or of other columns.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    names = list(columns)
    rows = []
    line = 0  # where the record that comes next begins, less one: a quoted value may span lines
    try:
        if header:
            names = next(reader, [])
            _check_header(path, names, columns, optional)
            line = reader.line_num
        first = True
        for values in reader:
            is_header, first = first and not header and _names_columns(values, columns), False
            if is_header:
                names = _in_our_spelling(values, columns)
                line = reader.line_num
                continue
            where = f"{path}, line {line + 1}"
            line = reader.line_num
            if not values:
                continue
            if len(values) != len(names):
                raise DataError(
                    f"{len(values)} columns where there should be {len(names)}",
                    where=where,
                    hint=f"the columns are {', '.join(names)}",
                )
            rows.append(Row(dict(zip(names, values, strict=True)), where))
    except csv.Error as error:
        raise DataError(f"not a whole CSV file: {error}", where=f"{path}, line {line + 1}") from error
    return _some(rows, path)


def read_json_lines(path: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a .jsonl or .jsonl.gz file with these columns of text."""
    return [Row(text_columns(record, columns, where), where) for record, where in read_json_records(path)]


def read_json_records(path: Path) -> list[tuple[Any, str]]:
    """Return every value of a .jsonl or .jsonl.gz file with its place."""
    lines = enumerate(read_text(path).split("\n"), 1)
    found = [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    return _some([(_parsed(line, where, "this line"), where) for where, line in found], path)


def read_json(path: Path) -> Any:
    """Return the value of a .json file."""
    return _parsed(read_text(path), str(path), "the file")


def numbered(records: object, where: str) -> list[tuple[Any, str]]:
    """Return each of a list of records with its place."""
    if not isinstance(records, list) or not records:
        raise DataError("there should be a list of rows", where=where, hint="get the file again")
    return [(record, f"{where}, row {number}") for number, record in enumerate(records, 1)]


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not valid JSON: {error}", where=where) from error


def text_columns(record: object, columns: Sequence[str], where: str) -> dict[str, str]:
    """Return these columns of a record; all have to be text."""
    if not isinstance(record, dict):
        raise DataError(
            f"a row has to be an object with named columns, not {type(record).__name__}", where=where
        )
    missing = [name for name in columns if name not in record]
    if missing:
        raise DataError(
            f"no column {', '.join(missing)}", where=where, hint=f"the columns are {', '.join(columns)}"
        )
    wrong = [name for name in columns if not isinstance(record[name], str)]
    if wrong:
        raise DataError(f"column {', '.join(wrong)} is not text", where=where)
    return {name: record[name] for name in columns}


def check_count(found: int, expected: int, where: object) -> None:
    """Refuse a set with more or fewer rows than published: its score would be another benchmark's."""
    if found != expected:
        raise DataError(
            f"{found} rows where the published set has {expected}",
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


def _in_our_spelling(header: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the names of a header's columns, known ones in our spelling."""
    known = {name.casefold(): name for name in columns} | {str(n): name for n, name in enumerate(columns)}
    return [known.get(name.strip().casefold(), name.strip()) for name in header]


def _check_header(
    path: object, names: Sequence[str], columns: Sequence[str], optional: Sequence[str]
) -> None:
    missing = [name for name in columns if name not in names]
    unknown = [name for name in names if name not in columns and name not in optional]
    if missing or unknown or len(set(names)) != len(names):
        raise DataError(
            f"the columns are {', '.join(names)}",
            where=f"{path}, line 1",
            hint=f"they should be {', '.join(columns)}",
        )


def read_text(path: Path | zipfile.Path) -> str:
    """Return the text of a file; the largest benchmark file has 5 MB."""
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise DataError("it is not a file", where=str(path), hint="put the original file in its place")
    try:
        raw = _bounded(path)
    except FileNotFoundError:
        raise DataError("no such benchmark file", where=str(path), hint=_siblings(path)) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"not a whole gzip file: {error}", where=str(path), hint="copy it again") from error
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


def _bounded(path: Path | zipfile.Path) -> bytes:
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


def _siblings(path: Path | zipfile.Path) -> str:
    folder = path.parent
    assert isinstance(folder, Path | zipfile.Path)  # noqa: S101  (typeshed says less of the second's parent)
    there = sorted(entry.name for entry in _entries(folder))
    return (
        f"the folder holds {', '.join(there[:8])}{' …' * (len(there) > 8)}"
        if there
        else "the folder is empty"
    )


def _entries(folder: Path | zipfile.Path) -> Iterator[Path | zipfile.Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _some(rows: list[T], path: object) -> list[T]:
    if not rows:
        raise DataError("the file is empty", where=str(path), hint="get it again")
    return rows
