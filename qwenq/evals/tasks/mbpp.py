"""Ask MBPP: 500 short Python tasks (numbers 11 to 510), each with three tests (Austin et al. 2021).

The base prompt is the paper's: tasks 2, 3 and 4 as examples, ``[BEGIN]`` and ``[DONE]`` around the code.
Qwen's own prompt (3 examples) is not published, nor one for chat models: ``card`` asks the same in one
message without examples and takes the first fenced block, our choice.

``mbpp.jsonl`` is the benchmark. Of ``sanitized-mbpp.json`` alone, its 257 tasks among those are asked, with a
notice.

Nothing here runs code. The tests' calls of the solution are appended to it as functions without arguments;
the tests compare their values in another process (see ``evals.sandbox``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwenq.errors import DataError
from qwenq.evals.sandbox.run import Program
from qwenq.evals.task import DataSource, Item, Judgement, Request, Task, Write, Written, first_turn, score_all
from qwenq.evals.tasks.data import (
    Row,
    check_count,
    copy_in,
    local_folder,
    numbered,
    place_of,
    read_hub,
    read_json,
    read_json_records,
    text_columns,
)

VERSION = 1
CARD_VERSION = 2

MAX_NEW_TOKENS = 512
TASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:"
    "\n\n{tests}\n"
)
QUESTION = TASK + "[BEGIN]\n"
SHOT = QUESTION + "{code}\n[DONE]\n\n"
STOPS = ("[DONE]",)
FENCED = re.compile(r"```(?:[\w.+-]+|[ \t]*(?:[Pp][Yy]\w*)?)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
MARKED = re.compile(r"\[BEGIN\]\n?(.*?)(?:\[DONE\]|$)", re.DOTALL)

EXAMPLES = ("2", "3", "4")
SCORED = range(11, 511)
FULL, SANITIZED = "mbpp.jsonl", "sanitized-mbpp.json"
COUNTS = {FULL: 500, SANITIZED: 257}
SPARE = 10
"""Of 500. A few of the benchmark's solutions return no plain value, or depend on the Python version."""
HUB = "google-research-datasets/mbpp"


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return the test split; there are no subjects."""
    name, rows = _rows(source)
    by_number: dict[str, Row] = {}
    for row in rows:
        if (first := by_number.setdefault(row.data["task_id"], row)) is not row:
            raise DataError(
                f"task {row.data['task_id']} occurs twice", where=row.where, hint=f"first: {first.where}"
            )
    scored = [row for number, row in by_number.items() if int(number) in SCORED]
    check_count(len(scored), COUNTS[name], rows[0].where.rsplit(", ", 1)[0])
    missing = [number for number in EXAMPLES[:shots] if number not in by_number]
    if missing:
        raise DataError(
            f"no task {', '.join(missing)}: the examples of the prompt",
            where=rows[0].where.rsplit(", ", 1)[0],
            hint="get the whole file",
        )
    shown = tuple(by_number[number].data for number in EXAMPLES[:shots])
    for row in scored:
        _check(row)
    return [Item(f"MBPP/{row.data['task_id']}", None, row.data, shown) for row in scored]


def ask_chat(item: Item) -> Request:
    """Return the task and its tests as the first message of a chat."""
    return Write(first_turn(TASK.format_map(item.data)), MAX_NEW_TOKENS)


def ask_base(item: Item) -> Request:
    """Return examples and task as plain text."""
    shown = "".join(SHOT.format_map(row) for row in item.shots)
    return Write(shown + QUESTION.format_map(item.data), MAX_NEW_TOKENS, STOPS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Extract the first fenced block, closed or not, else the text between the marks, else all."""
    for pattern in (FENCED, MARKED):
        if match := pattern.search(answer.text):
            return Judgement(False, match.group(1), note="not run")
    return Judgement(False, answer.text, note="not run; no block of code in the answer")


def read_base(item: Item, answer: Written) -> Judgement:
    """Take the whole answer as the code."""
    return Judgement(False, answer.text, note="not run")


class _Calls(ast.NodeTransformer):
    """Replacement of the tests' calls of the solution: ``f(2) == 4`` becomes ``_call_0() == 4``."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.taken: list[str] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace the outermost call of a name that the solution defines."""
        if any(isinstance(part, ast.Name) and part.id in self._names for part in ast.walk(node.func)):
            self.taken.append(ast.unparse(node))
            name = ast.Name(f"_call_{len(self.taken) - 1}", ast.Load())
            return ast.copy_location(ast.Call(name, [], []), node)
        return self.generic_visit(node)


def program(item: Item, solution: str) -> Program:
    """Return the sandbox's program: the solution, the tests' calls of it, and the tests."""
    tests, calls = _split(item.data)
    names = tuple(f"_call_{place}" for place in range(len(calls)))
    wrapped = "".join(
        f"\n\ndef {name}():\n    return {call}\n" for name, call in zip(names, calls, strict=True)
    )
    setup = item.data["setup"]
    own = not _names_in(ast.parse(setup)) & _defined(item.data["code"])
    return Program(
        id=item.id,
        solution=f"{solution}\n{setup}\n{wrapped}",
        entry_points=names,
        tests=tests,
        prelude=setup if own else "",  # a set-up that makes objects of the solution's stays with them
    )


def reference(item: Item) -> str:
    """Return the benchmark's own solution."""
    return item.data["code"]


def set_notice(items: Sequence[Item]) -> list[str]:
    """Return a notice where these are not the tasks of published scores."""
    if items and items[0].data["file"] == SANITIZED:
        return [f"{SANITIZED}: its tasks only, not comparable with a score over {COUNTS[FULL]}"]
    return []


def _split(data: Any) -> tuple[str, list[str]]:
    """Return the tests with calls of the solution replaced, and those calls."""
    taker = _Calls(_defined(data["code"]))
    tree = ast.fix_missing_locations(taker.visit(ast.parse(data["tests"])))
    return ast.unparse(tree), taker.taken


def _defined(code: str) -> set[str]:
    """Return the names that a solution defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _names_in(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _rows(source: DataSource) -> tuple[str, list[Row]]:
    folder = local_folder(source, "mbpp")
    ours = folder is not None and any((folder / name).exists() for name in (FULL, SANITIZED))
    copy = None if ours else copy_in(folder)
    if folder is None or copy is not None:
        found = [*_from_hub("prompt", copy), *_from_hub("test", copy)]
        return FULL, [_row(record, where, FULL) for record, where in found]
    name = SANITIZED if not (folder / FULL).exists() and (folder / SANITIZED).exists() else FULL
    return name, [_row(record, where, name) for record, where in _read(folder / name)]


def _read(path: Path) -> list[tuple[Any, str]]:
    if path.suffix == ".jsonl":
        return read_json_records(path)
    return numbered(read_json(path), str(path))


def _from_hub(split: str, copy: Path | None) -> list[tuple[Any, str]]:
    return numbered(read_hub(HUB, "full", split, sampled=False, copy=copy), place_of(HUB, split, copy))


def _row(record: object, where: str, name: str) -> Row:
    """Return one task of either file as text under the same names."""
    task, setup = ("text", "test_setup_code") if name == FULL else ("prompt", "test_imports")
    texts = text_columns(record, (task, "code"), where)
    rest: dict[str, Any] = record if isinstance(record, dict) else {}
    number, tests, before = (rest.get(key) for key in ("task_id", "test_list", setup))
    lines = before.splitlines() if isinstance(before, str) else before
    if type(number) is not int or not all(_is_texts(part) for part in (tests, lines)) or not tests:
        raise DataError(f"a task needs a number in task_id, and texts in test_list and {setup}", where=where)
    data = {
        "task_id": str(number),
        "text": texts[task],
        "code": texts["code"],
        "tests": "\n".join(tests),
        "setup": "\n".join(lines or ()),
        "file": name,
    }
    return Row(data, where)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _check(row: Row) -> None:
    """Refuse tests that would pass whatever the solution is."""
    try:
        _, calls = _split(row.data)
        ast.parse(row.data["setup"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise DataError(f"code or tests are not valid Python: {error}", where=row.where) from error
    if not calls:
        raise DataError("the tests call nothing that the solution defines", where=row.where)


_script = partial(
    Task,
    name="mbpp",
    version=VERSION,
    load=load,
    average=score_all,
    comment=set_notice,
    program=program,
    reference=reference,
    spare=SPARE,
)
PROTOCOLS: tuple[Task, ...] = (
    _script(protocol="card", version=CARD_VERSION, shots=0, allowed_shots=(0,), ask=ask_chat, read=read_chat),
    _script(protocol="base", shots=3, allowed_shots=range(4), ask=ask_base, read=read_base),
)
