"""Read local files as streams of documents, by their content; names only decide where bytes do not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qwenq.calibration.documents import (
    BESIDE_KEYS,
    CHAT_KEYS,
    KNOWN_KEYS,
    TEXT_SUFFICES,
    Document,
    from_record,
)
from qwenq.errors import CalibrationError, UsageError

LONGEST_LINE = 100_000_000
"""Bytes of a line, which is held in memory: a sparse file or a device could have one without end."""
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "unpack it: `unzip {name}`"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"%PDF", "a PDF", "extract its text, e.g. `pdftotext {name}`"),
    (b"GGUF", "a GGUF model", "name a text"),
    (b"\x89PNG", "an image", TEXT_SUFFICES),
    (b"\xff\xd8\xff", "an image", TEXT_SUFFICES),
    (b"GIF8", "an image", TEXT_SUFFICES),
    (b"SQLite format 3\x00", "an SQLite database", "export the text as JSON lines"),
    (b"ARROW1", "an Arrow file", "name the folder that `save_to_disk` made, or write it as .parquet"),
)
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
_BOMS = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def _zstandard(path: Path, _: str) -> IO[bytes]:
    """Open a .zst file through Arrow, which reads .parquet files too."""
    import pyarrow

    stream: Any = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream)


_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstandard,
}


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _opener(path: Path) -> Callable[..., Any] | None:
    """Return what decompresses a file, by its first bytes; None: it is not compressed."""
    start = _start(path)
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


def bare_suffix(path: Path) -> str:
    """Return the suffix in lower case, that of a compression left out: ``.jsonl`` of ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if it is compressed."""
    start, opener = _start(path), _opener(path)
    for magic, what, hint in _FOREIGN:
        if start.startswith(magic):
            raise CalibrationError(f"it is {what}, not a text", where=path, hint=hint.format(name=path.name))
    try:
        with (opener or open)(path, "rb") as file:
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if opener is None:
            raise
        raise CalibrationError(
            f"not a whole compressed file: {error}", where=path, hint="copy or download it again"
        ) from error


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines with their ends; a byte-order mark is dropped, other encodings are refused."""
    with open_bytes(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise CalibrationError(
                    f"a line of more than {LONGEST_LINE // 1_000_000} MB",
                    where=where,
                    hint="cut the text into lines, or documents of one line each",
                )
            refuse_other_encoding(line, where, path.name, first=number == 1)
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")


def refuse_other_encoding(raw: bytes, where: str, name: str, *, first: bool) -> None:
    """Refuse bytes that are not UTF-8, or hold zero bytes, which no text has; name what they probably are."""
    encoding = _marked(raw) if first else None
    if encoding is None and b"\0" in raw:
        encoding = _of_zeros(raw)
        what = f"it holds zero (NUL) bytes{f': probably {encoding}' if encoding else ', as binary files do'}"
        hint = _convert(encoding, name) if encoding else "name a text file"
        raise CalibrationError(what, where=where, hint=hint)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start} of the line",
            where=where,
            hint=_convert(encoding or "GB18030", name),
        ) from error


def _marked(raw: bytes) -> str | None:
    return next((encoding for mark, encoding in _BOMS if raw.startswith(mark)), None)


def _of_zeros(raw: bytes) -> str | None:
    """Return the encoding in which every second byte of Latin text is zero, if these bytes look so."""
    sample = raw[:4096]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    if max(even, odd) < len(sample) // 8 or min(even, odd) * 4 > max(even, odd):
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _convert(encoding: str, name: str) -> str:
    return f"convert it, e.g. `iconv -f {encoding} -t UTF-8 {name}`"


Reader = Callable[[Path, str | None], Iterator[Document]]

ACCEPTED = ".txt, .md, .jsonl, .json, .csv, .tsv, .parquet, also compressed (.gz, .bz2, .xz, .zst)"
PASSAGE, LONGEST_PASSAGE = 2_000, 8_000
"""A .txt file is one long text. It is cut into passages so that the seed has something to choose from: at the
first blank line after PASSAGE characters, or at the first line end after LONGEST_PASSAGE."""
_LARGEST_JSON = 512_000_000
TEXTS, JSONS = {".txt", ".text", ".md", ""}, {".json", ".jsonl", ".ndjson"}
TABLES = {".csv": ",", ".tsv": "\t"}


def read_file(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of a file, in file order; blank ones are left out.

    Args:
        path: the file; its content decides how it is read, and its suffix where the content could be either.
        column: key or column to read; None takes the first of text, messages, conversations that is filled.

    Raises:
        UsageError: not there, a folder, or a kind of file that nothing here reads.
        CalibrationError: its content cannot be read; names the line or row.
    """
    if not path.exists():
        raise UsageError("no such text", where=path, hint=f"accepted: {ACCEPTED}")
    if not path.is_file() and not path.is_dir():
        raise UsageError(
            "neither a file nor a folder", where=path, hint="copy what comes out of it to a file"
        )
    if path.is_dir():
        raise UsageError("a folder is not a text", where=path, hint=f"name one file: {ACCEPTED}")
    return (document for document in _reader_of(path, column)(path, column) if not document.blank)


def _reader_of(path: Path, column: str | None) -> Reader:
    suffix = bare_suffix(path)
    if suffix == ".parquet" or _start(path).startswith(b"PAR1"):
        return read_parquet
    if suffix in TABLES:
        return read_table
    if suffix in JSONS:
        return read_json_lines if _holds_lines(path, suffix, column) else read_json
    if suffix in TEXTS or (_opener(path) and suffix not in JSONS):
        first = _first_values(path, 1)
        holds_records = first and isinstance(first[0], dict) and _is_record(first[0], column)
        return read_json_lines if holds_records else read_text
    if suffix in _IMAGES:
        raise CalibrationError(f"a {suffix} image is not calibration text", where=path, hint=TEXT_SUFFICES)
    raise UsageError(f"cannot read a {path.suffix} file", where=path, hint=f"accepted: {ACCEPTED}")


def _holds_lines(path: Path, suffix: str, column: str | None) -> bool:
    """Return whether each line is a record; else the file is one JSON value. Names are not trusted here."""
    values = _first_values(path, 2)
    if not values:  # empty, or the first line is not a whole value
        return suffix != ".json" and not _begins_list(path)
    if isinstance(values[0], list):
        return len(values) == 2
    return len(values) == 2 or suffix != ".json" or _is_record(values[0], column)


def _is_record(value: Any, column: str | None) -> bool:
    keys = KNOWN_KEYS if column is None else (column,)
    return isinstance(value, dict) and any(key in value for key in keys)


def _first_values(path: Path, count: int) -> list[Any]:
    """Return what the first lines hold, as far as each is whole JSON; a broken second counts."""
    values: list[Any] = []
    try:
        for _, line in islice(((n, text) for n, text in lines_of(path) if text.strip()), count):
            values.append(json.loads(line))
    except (ValueError, RecursionError, CalibrationError):  # the reader that is chosen reports it
        return [*values, None] if values else []
    return values


def _begins_list(path: Path) -> bool:
    with suppress(CalibrationError):
        return next((line for _, line in lines_of(path) if line.strip()), "").lstrip().startswith("[")
    return False


def read_text(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield passages of a plain text (see PASSAGE)."""
    if column is not None:
        raise UsageError("a .txt file has no columns", where=path, hint="leave the column out")
    passage: list[str] = []
    size, start = 0, 1
    for number, line in lines_of(path):
        passage.append(line)
        size += len(line)
        if size >= (LONGEST_PASSAGE if line.strip() else PASSAGE):
            yield Document("".join(passage), f"{path}, line {start}")
            passage, size, start = [], 0, number + 1
    if "".join(passage).strip():
        yield Document("".join(passage), f"{path}, line {start}")


def read_json_lines(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield one record a line; blank lines are left out."""
    for number, line in lines_of(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield from_record(_parse_line(line, where), where, column)


def read_json(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield a list of records, as run_gptq.py takes it. It has to be parsed whole, so its size is bounded."""
    try:
        content = json.loads(_joined(path) or "null")
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CalibrationError(
            f"not whole JSON: {_complaint(error)}",
            where=f"{path}{line}",
            hint="repair or cut the file there; one record a line is called .jsonl",
        ) from error
    for number, record in enumerate(_records(content, path, column), 1):
        yield from_record(record, f"{path}, record {number}", column)


def _joined(path: Path) -> str:
    """Return the whole text, whose size after decompression is bounded too."""
    too_large = UsageError(
        f"over {_LARGEST_JSON // 1_000_000} MB of JSON would have to be read whole",
        where=path,
        hint="write it as .jsonl, one record a line, which is read as far as needed",
    )
    if path.stat().st_size > _LARGEST_JSON:
        raise too_large
    lines, size = [], 0
    for _, line in lines_of(path):
        size += len(line)
        if size > _LARGEST_JSON:
            raise too_large
        lines.append(line)
    return "".join(lines)


def _records(content: Any, path: Path, column: str | None) -> list[Any]:
    """Return the records of a JSON value: a list, one record, or an object with a list of records in it."""
    if content is None:
        return []
    if isinstance(content, list):
        return content
    if _is_record(content, column):
        return [content]
    lists = [v for v in content.values() if isinstance(v, list)] if isinstance(content, dict) else []
    inside = [value for value in lists if value and all(isinstance(record, dict) for record in value)]
    if len(inside) == 1:  # {"version": …, "data": […]}
        return inside[0]
    raise CalibrationError(
        f"a .json file holds a list of records, this one a {type(content).__name__}",
        where=path,
        hint=f"write [{{…}}, {{…}}], each record with one of {', '.join(KNOWN_KEYS)}",
    )


def read_table(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield one record a row of a .csv or .tsv file, whose first line names the columns."""
    csv.field_size_limit(LONGEST_PASSAGE * 1000)
    lines = (line for _, line in lines_of(path))
    rows = csv.DictReader(lines, delimiter=TABLES[bare_suffix(path)], strict=True)
    try:
        for number, record in enumerate(rows, 1):
            yield from_record(record, f"{path}, row {number}", column)
    except csv.Error as error:
        raise CalibrationError(
            f"not a whole table: {error}", where=f"{path}, line {rows.line_num}", hint="repair that line"
        ) from error


def read_parquet(path: Path, column: str | None = None) -> Iterator[Document]:
    """Yield one record a row; only columns that may be needed are read, a few hundred rows at a time."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        texts = [field.name for field in file.schema_arrow if pyarrow.types.is_string(field.type)]
        # A value that is stored once may stand in every row: it is not to be held as often.
        file = parquet.ParquetFile(path, read_dictionary=texts)
        names = file.schema_arrow.names
        known = [key for key in ((column,) if column else KNOWN_KEYS) if key in names]
        if not known:  # from_record names the columns there are
            from_record(dict.fromkeys(names), str(path), column)
        if column or any(key in CHAT_KEYS for key in known):
            known += [key for key in BESIDE_KEYS if key in names and key not in known]
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
    """Return the JSON reader's message; it also refuses endless digits and endless nesting."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)
