"""HumanEval: prompts as published, and the body that is read out of an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import DataError
from qwenq.evals.task import DataSource, Item, Judgement, Write, Written
from qwenq.evals.tasks.humaneval import program
from qwenq.evals.tasks.registry import get_task

CARD, BASE = (get_task("humaneval", protocol) for protocol in ("card", "base"))
canonical: Any = CARD.reference
PROMPT = (
    'import math\n\n\ndef add(a: int, b: int) -> int:\n    """ Adds.\n      >>> add(1, 2)\n    3\n    """\n'
)
ROW = {
    "task_id": "HumanEval/7",
    "prompt": PROMPT,
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
ITEM = Item("HumanEval/7", None, ROW)


def body(text: str) -> str | None:
    judgement = CARD.judge(ITEM, Written(text, 1, stopped=True))
    assert not judgement.correct  # nothing was run
    return judgement.extracted


def test_the_chat_prompt() -> None:
    request = CARD.request(ITEM)
    assert isinstance(request, Write) and (request.max_new_tokens, request.until) == (512, ())
    assert request.prompt[1]["content"] == (  # type: ignore[index]
        "Write a Python function `add(a: int, b: int) -> int` to solve the following problem:\n"
        f" Adds.\n>>> add(1, 2)\n3\n\n{PROMPT}".replace(" Adds", "Adds", 1)
    )


def test_the_base_prompt() -> None:
    assert BASE.request(ITEM) == Write(PROMPT, 512, ("<|endoftext|>", "\n\n", "def "))
    assert BASE.judge(ITEM, Written(" x\n", 1, stopped=True)) == Judgement(False, " x\n", note="not run")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (
            "Sure:\n```python\ndef add(a, b):\n    c = a\n\n    return c + b\n```\nIt adds.",
            "    c = a\n\n    return c + b",
        ),
        ("```\nimport os\n\ndef add(a, b) -> int:\n    return a + b\n```", "    return a + b"),
        ("```Python\ndef add(a, b):\n    return a\n```\n```python\nprint(add(1, 2))\n```", "    return a"),
        ("def add(a, b):\n    return a + b\n\nprint(add(1, 2))", "    return a + b"),
        ("def add(a, b):\n\tif a:\n\t\treturn b\n\n\treturn 1\nDone.", "\tif a:\n\t\treturn b\n\n\treturn 1"),
        ("def plus(a, b):\n    return a + b", "    return a + b"),
        ("return a + b", "    return a + b"),
        ("    return a + b\n", "    return a + b"),  # the scripts take white space around an answer away
        ("x = 1\n\nreturn x", "    x = 1\n\n    return x"),
        ("", ""),
    ],
)
def test_the_body_of_the_function(text: str, code: str) -> None:
    assert body(text) == code


PUBLISHED = r"```(?:[Pp]ython\n)?.*?def\s+add.*?:\n(.*?)\n```"
PARTS = [
    "```",
    "```python\n",
    "```Python\n",
    "def add",
    "def  add(a):\n",
    "def other(x):\n",
    ":\n",
    "\n",
    " x",
    ":",
]


@given(st.lists(st.sampled_from(PARTS), max_size=14))
def test_a_fenced_block_is_found_where_the_script_finds_it(parts: list[str]) -> None:
    text = "".join(parts).strip()
    published = re.search(PUBLISHED, text, re.DOTALL)
    if published:
        assert body(text) == published.group(1)


def test_hundreds_of_fences_take_no_minutes() -> None:
    """By the script's own pattern this takes one and a half."""
    text = "```" * 200 + "def add:\n" * 200
    assert body(text) == "def add:"


def test_an_answer_without_a_function_is_said() -> None:
    assert CARD.judge(ITEM, Written("no", 1, stopped=True)).note == "not run; no function in the answer"


def test_the_program_is_prompt_completion_and_tests() -> None:
    made = program(ITEM, canonical(ITEM))
    assert made.solution == PROMPT + "    return a + b\n"
    assert (made.id, made.entry_points, made.prelude) == ("HumanEval/7", ("add",), PROMPT)
    assert made.tests == ROW["test"] + "\ncheck(add)"
    assert CARD.needs_sandbox and not get_task("mmlu", "card").needs_sandbox


def test_the_score_is_the_share_that_passes() -> None:
    score = CARD.scores(
        [(ITEM, Judgement(True, "")), (ITEM, Judgement(False, "")), (ITEM, Judgement(True, ""))]
    )[0]
    assert (score.metric, len(score.verdicts), score.macro) == ("accuracy", 3, False)
    assert score.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"entry_point": "sub"}, "no function sub with a docstring"),
        ({"entry_point": "add("}, "not a function name"),
        ({"prompt": "def add(a, b):\n    pass\n"}, "no function add with a docstring"),
        ({"test": "assert True"}, "no function check"),
        ({"task_id": "HumanEval/0"}, "HumanEval/0 occurs twice"),
    ],
)
def test_broken_problems(tmp_path: Path, change: dict[str, str], says: str) -> None:
    (tmp_path / "humaneval").mkdir()
    rows = [{**ROW, "task_id": f"HumanEval/{n}", **(change if n == 3 else {})} for n in range(164)]
    path = tmp_path / "humaneval" / "HumanEval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught:
        CARD.items(DataSource(folder=tmp_path))
    assert caught.value.where == f"{path}, line 4"


def test_every_real_prompt_can_be_asked_and_every_real_solution_read_back(shared_data: Path) -> None:
    for item in CARD.items(DataSource(folder=shared_data)):
        CARD.request(item)
        fenced = f"```python\n{item.data['prompt']}{canonical(item).rstrip()}\n```"
        read = CARD.judge(item, Written(fenced, 1, stopped=True)).extracted
        assert read is not None and read.endswith(canonical(item).rstrip())
