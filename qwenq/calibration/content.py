"""Open files by their bytes: compression, encodings, binary data."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qwenq.errors import CalibrationError, UsageError

LONGEST_LINE = 100_000_000
"""Bytes of a line, which is held in memory: a sparse file or a device could have one without end."""
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
_ZSTD = b"\x28\xb5\x2f\xfd"
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "unpack it: `unzip {name}`"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"%PDF", "a PDF", "extract its text, e.g. `pdftotext {name}`"),
    (b"GGUF", "a GGUF model", "name a text"),
    (b"SQLite format 3\x00", "an SQLite database", "export the text as JSON lines"),
    (b"ARROW1", "an Arrow file", "name the folder that `save_to_disk` made, or write it as .parquet"),
)
_BOMS = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)


def is_parquet(path: Path) -> bool:
    """Return whether a file begins as parquet does."""
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def bare_suffix(path: Path) -> str:
    """Return the suffix in lower case, that of a compression left out: ``.jsonl`` of ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_compressed(path: Path) -> bool:
    """Return whether a file begins as gzip, bzip2, xz or zstandard does."""
    with path.open("rb") as file:
        start = file.read(6)
    return start.startswith(_ZSTD) or any(start.startswith(magic) for magic in _OPENERS)


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if it is compressed.

    Raises:
        UsageError: a compression whose library is not installed.
        CalibrationError: the compressed file is damaged, or its first bytes are not those of a text.
    """
    with path.open("rb") as stored:
        start = stored.read(16)
    for magic, what, hint in _FOREIGN:
        if start.startswith(magic):
            raise CalibrationError(f"it is {what}, not a text", where=path, hint=hint.format(name=path.name))
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
    try:
        with _zstandard(path) if start.startswith(_ZSTD) else opener(path, "rb") as file:
            yield file
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if is_compressed(path):  # bz2 and zstandard have no class of their own
            raise _damaged(path, error) from error
        raise


def _damaged(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"not a whole compressed file: {error}", where=path, hint="copy or download it again"
    )


def _zstandard(path: Path) -> IO[bytes]:
    """Open a .zst file through Arrow, which reads .parquet files too."""
    try:
        import pyarrow
    except ImportError:
        raise UsageError(
            "reading a .zst file needs the package pyarrow",
            where=path,
            hint=f"pip install 'qwenq[data]', or `zstd -d {path.name}`",
        ) from None
    stream: Any = pyarrow.input_stream(str(path), compression="zstd")
    return io.BufferedReader(stream)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines with their ends; a byte-order mark is dropped, other encodings are refused.

    Raises:
        CalibrationError: a line that is too long, or bytes that are not UTF-8 text; names the line.
    """
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
    """Refuse bytes that are not UTF-8, or hold zero bytes, which no text has.

    Args:
        raw: the bytes.
        where, name: of the file, for the message and the command that converts it.
        first: whether they are the file's beginning.

    Raises:
        CalibrationError: names the encoding that it probably is.
    """
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
