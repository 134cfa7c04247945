"""Ask HumanEval: 164 Python functions to write, each with its tests (Chen et al. 2021).

Sources of the protocols: ``evaluate_chat_humaneval.py`` and ``evaluate_humaneval.py`` of QwenLM/Qwen;
programs are openai/human-eval's. One item is worth 0.61 points, and the standard error of a score
of 26 % is 3.4 points.

Nothing here runs code: ``judge`` extracts the function's body from an answer, and a sandbox runs
``program(item, body)``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from qwenq.errors import DataError
from qwenq.evals.sandbox.run import Program
from qwenq.evals.task import DataSource, Item, Judgement, Task, Written
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row, text_columns

CHAT_PROMPT = "Write a Python function `{signature}` to solve the following problem:\n{description}\n{prompt}"
SIGNATURE = r"def\s+({entry_point}.*?):\s*\n"
DOCSTRING = re.compile(r"(?:\"\"\"|''')(.*?)(?:\"\"\"|''')", re.DOTALL)
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

SAMPLE_BEGIN = "    return"
"""Start of base answers in the sample suite. A chat model of 135 million parameters, which that suite is made
for, ends a function behind its docstring; all functions of the suite are one line."""


def make(row: Row, _: str | None) -> Item:
    """Return the item of a problem that can be asked and tested."""
    data = text_columns(row, ("task_id", "prompt", "entry_point", "canonical_solution", "test"))
    if not data["entry_point"].isidentifier():
        raise DataError(f"the entry point {data['entry_point']!r} is not a function name", where=row.where)
    if None in _described(data):
        what = f"the prompt has no function {data['entry_point']} with a docstring"
        raise DataError(what, where=row.where)
    if "def check(" not in data["test"]:
        raise DataError("the test has no function check", where=row.where)
    return Item(data["task_id"], None, data)


HUMANEVAL = Dataset(
    name="humaneval",
    make=make,
    counts={None: 164},
    hub="openai/openai_humaneval",
    files=("HumanEval.jsonl", "HumanEval.jsonl.gz"),
    package="human_eval",
)


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all problems; base answers to the sample suite's begin as given."""
    begin = {"begin": SAMPLE_BEGIN} if source.sample else {}
    return [replace(item, data={**item.data, **begin}) for item in HUMANEVAL.items(source)]


def _described(row: Mapping[str, str]) -> tuple[re.Match[str] | None, re.Match[str] | None]:
    """Return the function's signature and the description in its docstring."""
    signature = SIGNATURE.replace("{entry_point}", row["entry_point"])
    return re.search(signature, row["prompt"]), DOCSTRING.search(row["prompt"])


def fill_chat(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row with its signature, and its description without indentation."""
    signature, docstring = _described(row)
    assert signature and docstring  # noqa: S101  (checked when the row was read)
    lines = (line.strip() for line in docstring.group(1).split("\n"))
    return {**row, "signature": signature.group(1), "description": "\n".join(lines)}


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Extract the function's body, which continues the prompt; it has not run yet."""
    text = answer.text.strip()
    for pattern in BODIES:
        whole = pattern.replace("{entry_point}", item.data["entry_point"])
        if match := re.search(whole, text, re.DOTALL):
            return Judgement(False, match.group(1), note="not run")
    return Judgement(False, textwrap.indent(text, " " * 4), note="not run; no function in the answer")


def judge_base(item: Item, answer: Written) -> Judgement:
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


_solution: dict[str, Any] = {"program": program, "reference": lambda item: item.data["canonical_solution"]}
_task = partial(Task, name="humaneval", load=load, **_solution)
PROTOCOLS: tuple[Task, ...] = (
    _task(protocol="card", version=2, question=CHAT_PROMPT, fill=fill_chat, judge=judge_chat),
    _task(
        protocol="base",
        version=1,
        question="{prompt}{begin}",
        fill=lambda row: {"begin": "", **row},
        until=("<|endoftext|>", "\n\n", "def "),  # the script's fourth begins with the second
        judge=judge_base,
    ),
)
