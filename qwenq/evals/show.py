"""Show one item in full: prompt, answers and verdicts."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from qwenq.errors import QwenqError, StorageError, UsageError
from qwenq.evals.records import FOLDER, Record, read_records
from qwenq.evals.requests import limited, prompt_text, request_hash
from qwenq.evals.task import Choose, DataSource, Item, Request
from qwenq.evals.tasks.registry import get_task
from qwenq.results import read_rows

_REORDERING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}
"""Characters that make a terminal show text in another order than it is written in."""


def show_item(run: Path, id_: str, source: DataSource) -> str:
    """Return the text of ``qwenq eval --show``, without control characters.

    Args:
        run: the run folder.
        id_: of the item.
        source: the benchmark's data: prompts are not recorded but made again, and checked against the record.
            By default the sample suite, if all rows of the run are of it.

    Raises:
        UsageError: no records, or none of that item.
    """
    folder = run / FOLDER
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UsageError("no records there", where=folder, hint="name the run folder: --out runs/NAME")
    found = [(path, record) for path in files for record in read_records(path) if record.id == id_]
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


def visible(text: str) -> str:
    """Escape control characters, and those that change the direction of text (``\\x1b``)."""
    return "".join(_spelled(char) for char in text)


def _spelled(char: str) -> str:
    if char in "\n\t" or (unicodedata.category(char) not in {"Cc", "Cs"} and char not in _REORDERING):
        return char
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def _key(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            key = json.loads(file.readline())["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the records have no key: {error}", where=path) from error
    return key if isinstance(key, dict) else {}


def _question(key: dict[str, Any], record: Record, source: DataSource) -> str:
    title = f"=== {record.id} · {key.get('task')} · {key.get('protocol')} protocol"
    try:
        task = get_task(str(key.get("task")), str(key.get("protocol")))
        subjects = [record.subject] if record.subject is not None else []
        item = next(one for one in task.items(source, subjects, key.get("shots")) if one.id == record.id)
    except (QwenqError, StopIteration) as error:
        why = error.what if isinstance(error, QwenqError) else "the item is not in this data"
        return f"{title}\n(prompt not shown: {why}; name the data of this run: --data DIR or --sample)"
    limit = key.get("max_new_tokens")
    request = limited(task.request(item), limit if isinstance(limit, int) else None)
    changed = request_hash(item, request) != record.asked
    note = "\n(the data or the task has changed since: the recorded question was another)" if changed else ""
    return f"{title}{note}\n--- prompt\n{prompt_text(request.prompt)}{_wanted(item, request)}"


def _wanted(item: Item, request: Request) -> str:
    asked = f"\n--- continuations\n{list(request.choices)}" if isinstance(request, Choose) else ""
    gold = item.data.get("answer")
    return asked + (f"\n--- right answer\n{gold}" if gold is not None else "")


def _answer(path: Path, record: Record) -> str:
    verdict = {True: "correct", False: "wrong", None: "no verdict"}[record.correct]
    if record.correct is None and (record.note or "").startswith("not run"):
        verdict = "not run yet"
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
