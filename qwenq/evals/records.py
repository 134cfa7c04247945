"""Log answers item by item, so that no run asks twice.

    RUN/lock                      held while a process works here
    RUN/records/NAME.jsonl        one file per model and task; NAME ends in a hash of the key
        {"format": 1, "key": {…}}     first line: all that decides an answer but the item itself
        {"id": …, "asked": …, …}      a record; of those with one id and one question the last counts

A record answers for an item only where ``asked``, a hash of the prompt, the limits and the item's data, is
the same; records of other data under the same ids are kept. A generated answer is appended and flushed to the
disk (fsync) when it is complete, a program's verdict when it has run, letters when their batch is done: no
kill and no power cut loses a record. The next run removes a torn last line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qwenq.errors import StorageError
from qwenq.storage import fsync_folder, guard_storage

FORMAT = 1
FOLDER = "records"


@dataclass(frozen=True)
class Record:
    """One item, asked and judged.

    Attributes:
        id, subject: the item's.
        asked: `requests.request_hash`.
        prompt_tokens: tokens of the prompt.
        implementation: the code that ran, see ``Engine.implementation``.
        tokens: new tokens; 0 where continuations were scored.
        output: the text, or None for a choice.
        logprobs, published: of the continuations (see ``task.Chosen``), or None.
        extracted: the answer that was read from it.
        correct: the verdict; None where a program has not run yet, or the right answer is not published.
        also: further verdicts.
        note: why.
        stopped: whether the text ended before its limit.
        sandbox: in which the extracted program ran; None: it has not run, or an old version recorded it.
    """

    id: str
    subject: str | None
    asked: str
    prompt_tokens: int
    implementation: str = ""
    tokens: int = 0
    output: str | None = None
    logprobs: tuple[float, ...] | None = None
    published: tuple[float, ...] | None = None
    extracted: str | None = None
    correct: bool | None = None
    also: Mapping[str, bool] = field(default_factory=dict)
    note: str | None = None
    stopped: bool | None = None
    sandbox: str | None = None


class Records:
    """The records of one model and task, open for reading and appending.

    Args:
        run: the run folder.
        title: of the file; converted to a valid file name.
        key: everything that an answer depends on but the item: JSON values.

    Raises:
        StorageError: the disk refused, or a line other than the last is broken.
    """

    def __init__(self, run: Path, title: str, key: Mapping[str, Any]) -> None:
        text = json.dumps(key, ensure_ascii=False, sort_keys=True)
        self.path = run / FOLDER / f"{name_of(title, key)}.jsonl"
        self._key = json.loads(text)
        with guard_storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("ab+")
        try:
            self._known = self._read()
        except BaseException:
            with suppress(OSError):  # closing tries once more to write what a full disk refused
                self._file.close()
            raise

    @staticmethod
    def parts(run: Path, title: str, key: Mapping[str, Any]) -> list[Path]:
        """Return the logs with this key whose titles are this one and a number."""
        digest = _digest(json.dumps(key, ensure_ascii=False, sort_keys=True))
        ending = re.compile(re.escape(_name(title)) + rf"\d+\.{digest}\.jsonl")
        return sorted(path for path in (run / FOLDER).glob("*.jsonl") if ending.fullmatch(path.name))

    def find(self, id_: str, asked: str) -> Record | None:
        """Return the record of an item, if the same question was asked."""
        return self._known.get((id_, asked))

    def append(self, *records: Record) -> None:
        """Write records; they are on the disk when this returns.

        Raises:
            StorageError: the disk refused.
        """
        for record in records:
            self._known[record.id, record.asked] = record
            self._write(_plain(record))
        self._sync()

    def _sync(self) -> None:
        with guard_storage(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._sync()
        finally:
            with guard_storage(self.path):  # closing tries once more to write what a full disk refused
                self._file.close()

    def _write(self, value: Mapping[str, Any]) -> None:
        line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")
        with guard_storage(self.path, len(line)):
            self._file.write(line)
            self._file.flush()

    def _read(self) -> dict[tuple[str, str], Record]:
        """Read all records; begin a new file, and remove a torn last line."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        with guard_storage(self.path):
            if len(whole) < len(content):
                self._file.truncate(len(whole))
            if not whole:
                self._write({"format": FORMAT, "key": self._key})
                self._sync()
                fsync_folder(self.path.parent)
                return {}
        return _last(_records(self.path, whole))


def name_of(title: str, key: Mapping[str, Any]) -> str:
    """Return the name of a key's file without its suffix: no two keys share one."""
    return f"{_name(title)}.{_digest(json.dumps(key, ensure_ascii=False, sort_keys=True))}"


def _name(title: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", title)[:120].lstrip(".")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def read_records(path: Path) -> list[Record]:
    """Return the last record of every question in a file.

    Raises:
        StorageError: the file cannot be read, or a line is broken.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"it cannot be read: {error.strerror}", where=path) from error
    return list(_last(_records(path, content[: content.rfind(b"\n") + 1])).values())


def _last(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """Return the last record by id and question: data may change under an id, and back."""
    return {(record.id, record.asked): record for record in records}


def _records(path: Path, content: bytes) -> Iterator[Record]:
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
            if number == 1:
                if value["format"] != FORMAT:
                    raise ValueError(f"records of another format than {FORMAT}")
                continue
            record = _record(value)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(
                f"not a record: {error}",
                where=f"{path}, line {number}",
                hint="delete that line; its item is then asked again"
                if number > 1
                else "move this file away; its items are then asked again",
            ) from error
        yield record


def _record(value: Mapping[str, Any]) -> Record:
    lists = {name: tuple(value[name]) for name in ("logprobs", "published") if name in value}
    record = Record(**{**value, **lists})
    if not isinstance(record.id, str) or not isinstance(record.asked, str):
        raise TypeError("id and asked have to be texts")
    further = record.also.values() if isinstance(record.also, dict) else [None]
    if not isinstance(record.correct, bool | None) or not all(isinstance(one, bool) for one in further):
        raise TypeError("the verdicts have to be true or false")
    texts = record.subject, record.output, record.extracted, record.note, record.sandbox
    if not isinstance(record.implementation, str) or not all(isinstance(one, str | None) for one in texts):
        raise TypeError("answers and implementations have to be texts")
    figures = record.tokens, record.prompt_tokens, *(record.logprobs or ()), *(record.published or ())
    if not all(isinstance(one, int | float) for one in figures):
        raise TypeError("tokens and log-probabilities have to be numbers")
    return record


def _plain(record: Record) -> dict[str, Any]:
    """Return the fields that have a value: letters have no output, texts no log-probabilities."""
    values = asdict(record).items()
    return {name: value for name, value in values if name == "subject" or value not in (None, {})}
