"""Local files as streams of documents: nothing is read before it is asked for."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwenq.calibration.documents import KNOWN_KEYS, Document, from_record
from qwenq.errors import CalibrationError, UsageError

ACCEPTED = ".txt, .jsonl, .json, .parquet"
PASSAGE, LONGEST_PASSAGE = 2_000, 8_000
"""A .txt file is one long text. It is cut into passages so that the seed has something to choose from: at the
first blank line after PASSAGE characters, or at the first line end after LONGEST_PASSAGE."""
_CONVERT = "convert it, e.g. `iconv -f {} -t UTF-8 {}`"
_LARGEST_JSON = 512_000_000
LONGEST_LINE = 100_000_000
"""Bytes of a line, which is held in memory: of a file with a hole, or of a device, it would have no end."""


def read_file(path: Path, column: str | None = None) -> Iterator[Document]:
    """Documents of a .txt, .jsonl, .json or .parquet file, in file order; blank ones are left out.

    Args:
        path: the file; its suffix decides how it is read.
        column: key or column to read; None takes the first of text, messages, conversations.

    Raises:
        UsageError: not there, a folder, or a suffix that nothing here reads.
        CalibrationError: what is inside cannot be read; says the line or row.
    """
    readers: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {
        ".txt": read_text,
        ".jsonl": read_json_lines,
        ".json": read_json,
        ".parquet": read_parquet,
    }
    if not path.exists():
        raise UsageError("no such text", where=path, hint=f"accepted: {ACCEPTED}")
    if not path.is_file() and not path.is_dir():
        raise UsageError(
            "neither a file nor a folder", where=path, hint="copy what comes out of it to a file"
        )
    if path.is_dir():
        raise UsageError("a folder is no text", where=path, hint=f"name one file: {ACCEPTED}")
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"cannot read a {path.suffix or 'suffixless'} file", where=path, hint=f"accepted: {ACCEPTED}"
        )
    return (document for document in reader(path, column) if document.characters)


def read_text(path: Path, column: str | None = None) -> Iterator[Document]:
    """Passages of a plain text (see PASSAGE)."""
    if column is not None:
        raise UsageError("a .txt file has no columns", where=path, hint="leave the column out")
    passage: list[str] = []
    size, start = 0, 1
    for number, line in _lines(path):
        passage.append(line)
        size += len(line)
        if size >= (LONGEST_PASSAGE if line.strip() else PASSAGE):
            yield Document("".join(passage), f"{path}, line {start}")
            passage, size, start = [], 0, number + 1
    if "".join(passage).strip():
        yield Document("".join(passage), f"{path}, line {start}")


def read_json_lines(path: Path, column: str | None = None) -> Iterator[Document]:
    """One record a line; blank lines are left out."""
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield from_record(_parse_line(line, where), where, column)


def read_json(path: Path, column: str | None = None) -> Iterator[Document]:
    """A list of records, as run_gptq.py takes it. It has to be parsed whole, so its size is bounded."""
    if path.stat().st_size > _LARGEST_JSON:
        raise UsageError(
            f"a .json file of over {_LARGEST_JSON // 1_000_000} MB would have to be read whole",
            where=path,
            hint="write it as .jsonl, one record a line, which is read as far as needed",
        )
    try:
        records = json.loads("".join(line for _, line in _lines(path)) or "null")
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CalibrationError(
            f"not whole JSON: {_complaint(error)}",
            where=f"{path}{line}",
            hint="repair or cut the file there; one record a line is called .jsonl",
        ) from error
    if records is None:
        return
    if not isinstance(records, list):
        raise CalibrationError(
            f"a .json file holds a list of records, this one a {type(records).__name__}",
            where=path,
            hint=f"write [{{…}}, {{…}}], each record with one of {', '.join(KNOWN_KEYS)}",
        )
    for number, record in enumerate(records, 1):
        yield from_record(record, f"{path}, record {number}", column)


def read_parquet(path: Path, column: str | None = None) -> Iterator[Document]:
    """One record a row; only the one column is read, a few hundred rows at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "reading .parquet needs the package pyarrow", where=path, hint="pip install 'qwenq[data]'"
        ) from None
    number = 0
    try:
        file = parquet.ParquetFile(path)
        texts = [field.name for field in file.schema_arrow if pyarrow.types.is_string(field.type)]
        # A value that is stored once may stand in every row: it is not to be held as often.
        file = parquet.ParquetFile(path, read_dictionary=texts)
        wanted = [column] if column else [key for key in KNOWN_KEYS if key in file.schema_arrow.names][:1]
        known = [key for key in wanted if key in file.schema_arrow.names]
        if not known:  # from_record names the columns there are
            from_record(dict.fromkeys(file.schema_arrow.names), str(path), column)
        for batch in file.iter_batches(batch_size=256, columns=known):
            for row in range(len(batch)):
                number += 1
                (record,) = batch.slice(row, 1).to_pylist()
                yield from_record(record, f"{path}, row {number}", column)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"not a whole parquet file: {error}", where=f"{path}, row {number + 1}", hint="copy it again"
        ) from error


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith("\n") else "; the file seems cut off here"
        raise CalibrationError(
            f"this line is not whole JSON: {_complaint(error)}{cut}",
            where=where,
            hint="repair or remove the line",
        ) from error


def _complaint(error: ValueError | RecursionError) -> str:
    """Of the JSON reader, which also refuses numbers of thousands of digits and endless nesting."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; a byte-order mark is dropped, other encodings are refused."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            if len(line) > LONGEST_LINE:
                raise CalibrationError(
                    f"a line of more than {LONGEST_LINE // 1_000_000} MB",
                    where=f"{path}, line {number}",
                    hint="cut the text into lines, or documents of one line each",
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError(
                    f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start} of the line",
                    where=f"{path}, line {number}",
                    hint=_how_to_convert(line if number == 1 else b"", path.name),
                ) from error


def _how_to_convert(start: bytes, name: str) -> str:
    """What makes UTF-8 of a file; of its ``start`` nothing need be known."""
    if start.startswith(b"\x1f\x8b"):
        return f"it is compressed: `gunzip -c {name}` gives its text"
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return _CONVERT.format("UTF-16" if utf16 else "GB18030", name)
