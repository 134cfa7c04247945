"""Record each answer and verdict on the disk, so that no run asks twice; show a recorded item."""

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

from pydantic import TypeAdapter

from qwenq.errors import QwenqError, StorageError, UsageError, visible
from qwenq.evals.batching import prompt_text, request_hash
from qwenq.evals.task import Choose, DataSource
from qwenq.evals.tasks.registry import get_task
from qwenq.results import read_rows
from qwenq.storage import fsync_folder, guard_storage

# Log answers item by item, so that no run asks twice.
#
#     RUN/lock                      held while a process works here
#     RUN/records/NAME.jsonl        one file per model and task; NAME ends in a hash of the key
#         {"format": 1, "key": {…}}     first line: all that decides an answer but the item itself
#         {"id": …, "asked": …, …}      a record; of those with one id and one question the last counts
#
# A record answers for an item only where ``asked``, a hash of the prompt, the limits and the item's data,
# is the same; records of other data under the same ids are kept. A generated answer is appended and flushed
# to the disk (fsync) when it is complete, a program's verdict when it has run, letters when their batch is
# done: no kill and no power cut loses a record. The next run removes a torn last line.


FORMAT = 1
FOLDER = "records"
TITLE = 100  # characters, so that a long file name keeps its rank


@dataclass(frozen=True)
class AnswerRecord:
    """One item, asked and judged."""

    id: str
    subject: str | None
    asked: str  # ``batching.request_hash``
    prompt_tokens: int
    implementation: str = ""  # the code that ran, see ``Engine.implementation``
    tokens: int = 0  # new tokens; 0 where continuations were scored
    output: str | None = None  # the text, or None for a choice
    # logprobs, published: of the continuations (see ``task.Chosen``), or None
    logprobs: tuple[float, ...] | None = None
    published: tuple[float, ...] | None = None
    extracted: str | None = None  # the answer that was read from it
    correct: bool | None = None  # the verdict; None where a program has not run yet
    also: Mapping[str, bool] = field(default_factory=dict)  # further verdicts
    note: str | None = None
    stopped: bool | None = None  # whether the text ended before its limit
    # in which the extracted program ran; None: it has not run, or an old version recorded it
    sandbox: str | None = None


_RECORDS = TypeAdapter(AnswerRecord)


class AnswerLog:
    """The records of one model and task, open for reading and appending.

    Args:
        run: the run folder, on a disk that all ranks share.
        title: of the file; converted to a valid file name.
        key: everything that an answer depends on but the item: JSON values.
        rank: of the process; each has a log, which that of rank 0 takes over.

    Raises:
        StorageError: the disk refused, or a line other than the last is broken.
    """

    def __init__(self, run: Path, title: str, key: Mapping[str, Any], rank: int = 0) -> None:
        part = f"{title[:TITLE]}.rank"
        self.path = run / FOLDER / f"{name_of(f'{part}{rank}' if rank else title, key)}.jsonl"
        self._key, self._part = json.loads(json.dumps(key, sort_keys=True)), part
        with guard_storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self.path.open("ab+")
        try:
            self._known = self._read()
        except BaseException:
            with suppress(OSError):  # closing tries once more to write what a full disk refused
                self._file.close()
            raise

    def find(self, id_: str, asked: str) -> AnswerRecord | None:
        """Return the record of an item, if the same question was asked."""
        return self._known.get((id_, asked))

    def append(self, *records: AnswerRecord) -> None:
        """Write records; they are on the disk when this returns."""
        for record in records:
            self._known[record.id, record.asked] = record
            self._write(_plain(record))
        self._sync()

    def merge_ranks(self) -> list[AnswerRecord]:
        """Take over the logs of other ranks, of this run or an earlier one; return the new records."""
        title, _, digest = name_of(self._part, self._key).rpartition(".")
        part = re.compile(rf"{re.escape(title)}\d+\.{digest}\.jsonl")
        found: list[AnswerRecord] = []
        for path in sorted(path for path in self.path.parent.iterdir() if part.fullmatch(path.name)):
            new = [one for one in read_answer_log(path) if self.find(one.id, one.asked) is None]
            self.append(*new)
            found += new
            with guard_storage(path):
                path.unlink()
        return found

    def _sync(self) -> None:
        with guard_storage(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> AnswerLog:
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

    def _read(self) -> dict[tuple[str, str], AnswerRecord]:
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
    digest = hashlib.sha256(json.dumps(key, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title)[:120].lstrip('.')}.{digest}"


def read_answer_log(path: Path) -> list[AnswerRecord]:
    """Return the last record of every question in a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"it cannot be read: {error.strerror}", where=path) from error
    return list(_last(_records(path, content[: content.rfind(b"\n") + 1])).values())


def _last(records: Iterable[AnswerRecord]) -> dict[tuple[str, str], AnswerRecord]:
    """Return the last record by id and question: data may change under an id, and back."""
    return {(record.id, record.asked): record for record in records}


def _records(path: Path, content: bytes) -> Iterator[AnswerRecord]:
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            if number == 1:
                if json.loads(line)["format"] != FORMAT:
                    raise ValueError(f"records of another format than {FORMAT}")
                continue
            record = _RECORDS.validate_json(line, strict=True)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(
                f"not a record: {error}",
                where=f"{path}, line {number}",
                hint="delete that line; its item is then asked again"
                if number > 1
                else "move this file away; its items are then asked again",
            ) from error
        yield record


def _plain(record: AnswerRecord) -> dict[str, Any]:
    """Return the fields that have a value: letters have no output, texts no log-probabilities."""
    values = asdict(record).items()
    return {name: value for name, value in values if name == "subject" or value not in (None, {})}


# Show one item in full: prompt, answers and verdicts.


def show_item(run: Path, id_: str, source: DataSource) -> str:
    """Return the text of ``qwenq eval --show``, without control characters.

    Prompts are not recorded but made again from the benchmark's data, and checked against the record. Without
    a source that is the sample suite, if all rows of the run are of it.
    """
    folder = run / FOLDER
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UsageError("no records there", where=folder, hint="name the run folder: --out runs/NAME")
    found = [(path, record) for path in files for record in read_answer_log(path) if record.id == id_]
    if not found:
        raise UsageError(
            f"no record of {id_!r}", where=folder, hint="ids look like abstract_algebra/12 or HumanEval/3"
        )
    if source == DataSource() and _is_sample(run):
        source = DataSource(sample=True)
    sections, shown = [], ""
    for path, record in found:
        key = _key(path)
        question = _question(key, record, source)
        if question != shown:
            sections.append(question)
            shown = question
        sections.append(_answer(path, record))
    return visible("\n\n".join(sections))


def _is_sample(run: Path) -> bool:
    """Return whether the run has scores, all of the sample suite."""
    try:
        points = [row.point for row in read_rows(run) if "task" in row.point]
    except QwenqError:
        return False
    return bool(points) and all("data" in point for point in points)


def _key(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            key = json.loads(file.readline())["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the records have no key: {error}", where=path) from error
    return key if isinstance(key, dict) else {}


def _question(key: dict[str, Any], record: AnswerRecord, source: DataSource) -> str:
    title = f"=== {record.id} · {key.get('task')} · {key.get('protocol')} protocol"
    try:
        task = get_task(str(key.get("task")), str(key.get("protocol")))
        subjects = [record.subject] if record.subject is not None else []
        item = next(one for one in task.items(source, subjects, key.get("shots")) if one.id == record.id)
    except (QwenqError, StopIteration) as error:
        why = error.what if isinstance(error, QwenqError) else "the item is not in this data"
        return f"{title}\n(prompt not shown: {why}; name the data of this run: --data DIR or --sample)"
    limit = key.get("max_new_tokens")
    request = task.request(item, limit if isinstance(limit, int) else None)
    changed = request_hash(item, request) != record.asked
    note = "\n(the data or the task has changed since: the recorded question was another)" if changed else ""
    lines = [f"{title}{note}\n--- prompt\n{prompt_text(request.prompt)}"]
    lines += [f"--- continuations\n{list(request.choices)}"] if isinstance(request, Choose) else []
    lines += [f"--- right answer\n{item.data['answer']}"] if "answer" in item.data else []
    return "\n".join(lines)


def _answer(path: Path, record: AnswerRecord) -> str:
    verdict = {True: "correct", False: "wrong", None: "not run yet"}[record.correct]
    lines = [f"=== {path.name.rsplit('.', 2)[0]}: {verdict}"]
    if record.output is not None:
        end = "" if record.stopped else ", cut at the limit"
        lines.append(f"--- answer ({record.tokens} tokens{end})\n{record.output}")
    if record.logprobs is not None:
        lines.append(f"--- log-probabilities\n{', '.join(f'{value:.4f}' for value in record.logprobs)}")
    lines.append(f"--- extracted answer\n{record.extracted}")
    if record.also:
        lines.append("--- also\n" + ", ".join(f"{k}: {v}" for k, v in sorted(record.also.items())))
    if record.note:
        lines.append(f"--- note\n{record.note}")
    lines.append(f"--- ran\n{record.implementation}; prompt of {record.prompt_tokens} tokens")
    return "\n".join(lines)
