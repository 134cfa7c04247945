"""Read benchmark files from a folder or the hub, whole and checked row by row."""

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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from qwenq import stopping
from qwenq.errors import DataError
from qwenq.evals.task import DataSource

# Read benchmark files, and name the file and line of each error.


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
    path: Path | zipfile.Path, columns: Sequence[str], *, header: bool, optional: Sequence[str] | None = ()
) -> list[Row]:
    """Return the rows of a CSV file; every value is text.

    Args:
        path: UTF-8, with or without a byte-order mark.
        columns: their names, in order where the file has no header.
        header: whether the first line has to name the columns; if not, it may, as some copies have one.
        optional: further columns that the file may have; None: any.

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
    path: object, names: Sequence[str], columns: Sequence[str], optional: Sequence[str] | None
) -> None:
    missing = [name for name in columns if name not in names]
    allowed = [*columns, *(names if optional is None else optional)]
    unknown = [name for name in names if name not in allowed]
    counted = [name for name in names if optional is not None or name in columns]
    if missing or unknown or len(set(counted)) != len(counted):
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


# Read benchmarks from the hub: data sets that load without remote code, or single files.


_CONNECT = "either connect to the hub{package}, or put the files into a folder and name it: --data DIR"
_NEITHER = "; --sample needs neither, but is not the benchmark"
_TIMEOUT = 10.0  # seconds


def read_hub(
    dataset: str, config: str | None, split: str, *, sampled: bool = True, copy: Path | None = None
) -> list[dict[str, Any]]:
    """Return all rows of one split, in its order, through the ``datasets`` library.

    Args:
        dataset: ``owner/name``; not one with a script (since datasets 4).
        config: one of its configurations; None where it has only one.
        split: such as ``test``.
        sampled: whether the sample suite has this benchmark, too.
        copy: a folder with the set's parquet files, as downloaded; None: the hub.

    Raises:
        DataError: ``datasets`` is not installed, the hub cannot be reached, or has no such set.
    """
    if copy is not None:
        return _read_copy(copy, config, split)
    where = f"hub dataset {dataset}{f', {config}' if config else ''}, split {split}"
    ways = _CONNECT.format(package=" (pip install datasets)") + (_NEITHER if sampled else "")
    try:
        import datasets
    except ImportError:
        raise DataError(
            "benchmarks come from the hub, which needs the package datasets", where=where, hint=ways
        ) from None
    try:
        with _from_the_cache(datasets, why=_unreachable(dataset)):
            rows: Iterable[Any] = datasets.load_dataset(dataset, config, split=split)
            listed = [dict(row) for row in rows]
    except _errors_of(datasets) as error:
        raise _no_benchmark(error, where, ways) from error
    if not listed:
        raise DataError("the hub returned no rows", where=where, hint=ways)
    return listed


def hub_rows(
    dataset: str,
    config: str | None,
    split: str,
    columns: Sequence[str],
    *,
    sampled: bool = True,
    copy: Path | None = None,
) -> list[Row]:
    """Return the rows of one split with these columns of text; arguments as of ``read_hub``."""
    where = place_of(f"{dataset}, {config}" if config else dataset, split, copy)
    records = numbered(read_hub(dataset, config, split, sampled=sampled, copy=copy), where)
    return [Row(text_columns(record, columns, place), place) for record, place in records]


def copy_in(folder: Path | None) -> Path | None:
    """Return the folder if parquet files of a hub data set lie in it, however deep."""
    return folder if folder is not None and next(folder.rglob("*.parquet"), None) else None


def place_of(dataset: str, split: str, copy: Path | None) -> str:
    """Return the source of ``read_hub``'s rows, for messages."""
    return f"hub dataset {dataset}, split {split}" if copy is None else f"{copy}, split {split}"


def _read_copy(folder: Path, config: str | None, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split from parquet files that lie as on the hub."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            "reading .parquet needs the package pyarrow", where=folder, hint="pip install pyarrow"
        ) from None
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
    if not of_config and len({parts[:-1] for _, parts in inside}) == 1:
        of_config = inside  # downloaded alone, without its folder
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


def fetch_hub_file(dataset: str, name: str, *, sampled: bool = True) -> Path:
    """Return one file of a hub dataset, downloaded or from the cache.

    Args:
        dataset: ``owner/name``.
        name: of the file, within the dataset.
        sampled: whether the sample suite has this benchmark, too.

    Raises:
        DataError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    where = f"hub dataset {dataset}, {name}"
    ways = _CONNECT.format(package="") + (_NEITHER if sampled else "")
    why = _unreachable(dataset)
    try:
        found = hf_hub_download(dataset, name, repo_type="dataset", local_files_only=why is not None)
    except (OSError, ValueError, RuntimeError, _http_error()) as error:
        raise _no_benchmark(why or error, where, ways) from error
    return Path(found)


def _errors_of(datasets: Any) -> tuple[type[Exception], ...]:
    """Return what it raises where a set is unreachable, missing, refused, damaged or not as declared."""
    own = getattr(getattr(datasets, "exceptions", None), "DatasetsError", OSError)
    return OSError, ValueError, RuntimeError, KeyError, own, _http_error()


def _no_benchmark(error: Exception, where: str, ways: str) -> BaseException:
    """Return the error to raise; a stop (SIGTERM) behind it comes first."""
    if (stop := stopping.behind(error)) is not None:
        return stop
    hidden = type(error).__name__ == "DatasetGenerationError"  # its text lacks the reason
    found = error.__cause__ if hidden and error.__cause__ is not None else error
    reason = str(found).strip().splitlines() or [type(found).__name__]
    return DataError(f"the benchmark could not be loaded from the hub: {reason[0]}", where=where, hint=ways)


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
    try:
        HfApi().dataset_info(dataset, timeout=_TIMEOUT)
    except HfHubHTTPError:
        return None  # it answers; the download has the better error
    except (OSError, _http_error()) as error:
        return _UnreachableError(f"{constants.ENDPOINT} could not be reached: {error}")
    return None


def _http_error() -> type[Exception]:
    """Return the base error of the hub's HTTP library, which is httpx or a successor."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


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
