"""Ask MBPP: 500 short Python tasks (numbers 11 to 510), each with three tests (Austin et al. 2021).

The base prompt is the paper's: tasks 2, 3 and 4 as examples, ``[BEGIN]`` and ``[DONE]`` around the code.
Qwen's own prompt (3 examples) is not published, nor one for chat models: ``card`` asks the same in one
message without examples and takes the first fenced block, our choice.

Nothing here runs code. The tests' calls of the solution are appended to it as functions without arguments;
the tests compare their values in another process (see ``evals.sandbox``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qwenq.errors import DataError
from qwenq.evals.sandbox.run import Program
from qwenq.evals.task import DataSource, Item, Judgement, Task, Written
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row, check_count, text_columns

TASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:"
    "\n\n{tests}\n"
)
FENCED = re.compile(r"```(?:[\w.+-]+|[ \t]*(?:[Pp][Yy]\w*)?)[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL)
MARKED = re.compile(r"\[BEGIN\]\n?(.*?)(?:\[DONE\]|$)", re.DOTALL)

EXAMPLES = ("2", "3", "4")
SCORED = range(11, 511)


def make(row: Row, _: str | None) -> Item:
    """Return the item of a task, as text."""
    texts = text_columns(row, ("text", "code", "test_setup_code"))
    number, tests = row.data.get("task_id"), row.data.get("test_list")
    listed = isinstance(tests, list) and all(isinstance(test, str) for test in tests)
    if type(number) is not int or not tests or not listed:
        raise DataError("a task needs a number in task_id, and texts in test_list", where=row.where)
    data = {
        "task_id": str(number),
        "text": texts["text"],
        "code": texts["code"],
        "tests": "\n".join(tests),
        "setup": "\n".join(texts["test_setup_code"].splitlines()),
    }
    if number in SCORED:
        _check(data, row.where)
    return Item(f"MBPP/{number}", None, data)


def _check(data: Mapping[str, str], where: str) -> None:
    """Refuse tests that would pass whatever the solution is."""
    try:
        _, calls = _split(data)
        ast.parse(data["setup"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise DataError(f"code or tests are not valid Python: {error}", where=where) from error
    if not calls:
        raise DataError("the tests call nothing that the solution defines", where=where)


MBPP = Dataset(
    name="mbpp",
    make=make,
    counts={None: None},
    hub="google-research-datasets/mbpp",
    config="full",
    split="prompt+test",
    files=("mbpp.jsonl",),
)


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return the test split; there are no subjects."""
    items = {item.data["task_id"]: item for item in MBPP.items(source)}
    scored = [item for number, item in items.items() if int(number) in SCORED]
    where = source.folder / "mbpp" if source.folder else f"hub dataset {MBPP.hub}"
    check_count(len(scored), len(SCORED), where)
    if missing := [number for number in EXAMPLES[:shots] if number not in items]:
        raise DataError(
            f"no task {', '.join(missing)}: the examples of the prompt",
            where=where,
            hint="get the whole file",
        )
    shown = tuple(items[number].data for number in EXAMPLES[:shots])
    return [replace(item, shots=shown) for item in scored]


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Extract the first fenced block, closed or not, else the text between the marks, else all."""
    for pattern in (FENCED, MARKED):
        if match := pattern.search(answer.text):
            return Judgement(False, match.group(1), note="not run")
    return Judgement(False, answer.text, note="not run; no block of code in the answer")


def judge_base(item: Item, answer: Written) -> Judgement:
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
    used = {node.id for node in ast.walk(ast.parse(setup)) if isinstance(node, ast.Name)}
    own = not used & _defined(item.data["code"])
    return Program(
        id=item.id,
        solution=f"{solution}\n{setup}\n{wrapped}",
        entry_points=names,
        tests=tests,
        prelude=setup if own else "",  # a set-up that makes objects of the solution's stays with them
    )


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


_task = partial(
    Task,
    name="mbpp",
    load=load,
    program=program,
    reference=lambda item: item.data["code"],
    spare=10,  # of 500: a few solutions return no plain value, or depend on the Python version
)
PROTOCOLS: tuple[Task, ...] = (
    _task(protocol="card", version=2, question=TASK, judge=judge_chat),
    _task(
        protocol="base",
        version=1,
        shots=3,
        allowed_shots=range(4),
        shot=TASK + "[BEGIN]\n{code}\n[DONE]\n\n",
        question=TASK + "[BEGIN]\n",
        until=("[DONE]",),
        judge=judge_base,
    ),
)
