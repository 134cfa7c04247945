"""MBPP: the paper's prompt, and programs whose verdict is the tests', not the solution's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwenq.errors import DataError, UnsupportedError
from qwenq.evals.run import make_plan
from qwenq.evals.sandbox.run import Sandbox, find_sandbox, run_programs
from qwenq.evals.suite import check_solutions
from qwenq.evals.task import DataSource, Item, Write, Written
from qwenq.evals.tasks.mbpp import program
from qwenq.evals.tasks.registry import get_task
from qwenq.events import Event, Notice

CARD, BASE = (get_task("mbpp", protocol) for protocol in ("card", "base"))
reference: Any = BASE.reference
NODE = {
    "code": "class Node:\r\n    def __init__(self, value):\r\n        self.value, self.next = value, None\r\n"
    "def length(node):\r\n    return 0 if node is None else 1 + length(node.next)",
    "test_setup_code": "head = Node(1)\nhead.next = Node(2)",
    "test_list": ["assert length(head) == 2", "assert length(head.next) == 1", "assert length(None) == 0"],
}


def task(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "text": f"Add {number} to a number.",
        "code": f"def add(x):\r\n    return x + {number}",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert add({n}) == {n + number}" for n in range(3)],
        "challenge_test_list": [],
        **changes,
    }


def write_mbpp(data: Path, tasks: list[dict[str, Any]] | None = None, **changes: Any) -> DataSource:
    """All 974; ``changes`` are of number 11."""
    (data / "mbpp").mkdir(parents=True, exist_ok=True)
    rows = tasks or [task(n, **(changes if n == 11 else {})) for n in range(1, 975)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "mbpp" / "mbpp.jsonl").write_text(text, encoding="utf-8")
    return DataSource(data)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return BASE.items(write_mbpp(tmp_path_factory.mktemp("mbpp"), **NODE))


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return find_sandbox()
    except UnsupportedError as error:
        pytest.skip(error.what)


def test_the_base_prompt_is_the_papers(items: list[Item]) -> None:
    assert (len(items), items[0].id, items[-1].id) == (500, "MBPP/11", "MBPP/510")
    request = BASE.request(items[1])
    assert isinstance(request, Write) and request.until == ("[DONE]",)
    head = "You are an expert Python programmer, and here is your task: Add {} to a number. "
    head += "Your code should pass these tests:\n\n"
    assert isinstance(request.prompt, str)
    assert request.prompt.startswith(
        head.format(2) + "assert add(0) == 2\nassert add(1) == 3\nassert add(2) == 4\n[BEGIN]\n"
        "def add(x):\r\n    return x + 2\n[DONE]\n\n" + head.format(3)
    )
    tests = "assert add(0) == 12\nassert add(1) == 13\nassert add(2) == 14\n"
    assert request.prompt.endswith("[DONE]\n\n" + head.format(12) + tests + "[BEGIN]\n")


def test_the_chat_prompt_shows_the_task_alone(items: list[Item]) -> None:
    prompt = CARD.request(items[1]).prompt
    assert prompt[1]["content"].count("You are an expert") == 1  # type: ignore[index]
    assert "[BEGIN]" not in prompt[1]["content"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (
            "Sure:\n```python\ndef add(x):\n    return x\n```\nand\n```\nno\n```",
            "def add(x):\n    return x\n",
        ),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python3\nx = 1\n```\nSo:\n```\nprint(x)\n```", "x = 1\n"),
        ("``` PY \r\nx = 1\n```", "x = 1\n"),
        ("Not ```y``` here\n```\nx = 1\n```", "x = 1\n"),
        ("Like this:\n```python\nx = 1\n", "x = 1\n"),  # cut at the limit, or never closed
        ("[BEGIN]\nx = 2\n[DONE] bye", "x = 2\n"),
        ("x = 3", "x = 3"),
    ],
)
def test_the_code_of_a_chat_answer(items: list[Item], text: str, code: str) -> None:
    judgement = CARD.judge(items[0], Written(text, 1, stopped=True))
    assert (judgement.extracted, judgement.correct) == (code, False)


def test_the_benchmarks_own_solutions_pass(items: list[Item], sandbox: Sandbox) -> None:
    some = [items[0], items[1], items[-1]]
    assert all(o.passed for o in run_programs([program(i, reference(i)) for i in some], sandbox=sandbox))


@pytest.mark.parametrize(
    "solution",
    [
        "def add(x):\n    return x",
        "def add(x): return 12",
        "",
        "def add(x:",
        "class Same(int):\n    def __eq__(self, other): return True\ndef add(x): return Same()",
        "def add(x): exit(0)",
        "import os\nos._exit(0)",
        "_call_0 = _call_1 = _call_2 = lambda: 12\ndef add(x): return 12",
    ],
)
def test_wrong_solutions_fail(items: list[Item], sandbox: Sandbox, solution: str) -> None:
    (outcome,) = run_programs([program(items[1], solution)], sandbox=sandbox)
    assert not outcome.passed


def test_a_solution_named_like_a_builtin_and_tests_with_imports(sandbox: Sandbox) -> None:
    data = {
        "code": "def sum(a, b):\n    return a / b",
        "tests": "assert math.isclose(sum(1, 3), 1 / 3)\nassert set([sum(4, 2)]) == set([2.0])",
        "setup": "import math",
    }
    item = Item("MBPP/11", None, data)
    made = program(item, reference(item))
    assert made.prelude == "import math"
    assert made.tests == "assert math.isclose(_call_0(), 1 / 3)\nassert set([_call_1()]) == set([2.0])"
    assert run_programs([made], sandbox=sandbox)[0].passed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"test_list": []}, "a task needs a number"),
        ({"test_list": "assert add(1)"}, "a task needs a number"),
        ({"task_id": "11"}, "a task needs a number"),
        ({"task_id": True}, "a task needs a number"),
        ({"test_list": ["assert True"]}, "call nothing that the solution defines"),
        ({"code": "def add("}, "not valid Python"),
        ({"code": "x = " + "-" * 100_000 + "1"}, "not valid Python"),
        ({"task_id": 12}, "MBPP/12 occurs twice"),
        ({"text": 1}, "column text is not text"),
    ],
)
def test_broken_tasks(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        BASE.items(write_mbpp(tmp_path, **change))
    line = 12 if "twice" in says else 11
    assert str(caught.value.where).endswith(f"mbpp.jsonl, line {line}")


def test_a_few_broken_solutions_are_said_many_are_refused(tmp_path: Path, sandbox: Sandbox) -> None:
    wrong = {"code": "def add(x):\n    return None"}
    rows = [task(n, **(wrong if n in (13, 15) else {})) for n in range(1, 975)]
    source, events = write_mbpp(tmp_path, rows), list[Event]()
    plan = make_plan(BASE, source, (), None, 6)
    check_solutions(plan, sandbox, tmp_path / "run", events.append)  # type: ignore[arg-type]
    notice = next(event.text for event in events if isinstance(event, Notice) and "fail" in event.text)
    assert "2 of 6 solutions of the benchmark itself fail" in notice
    assert "MBPP/13, MBPP/15" in notice
    with pytest.raises(DataError, match="2 of 3 solutions"):
        few = make_plan(BASE, source, (), None, 5)
        some = SimpleNamespace(task=few.task, items=few.items[2:5])
        check_solutions(some, sandbox, tmp_path / "other", events.append)  # type: ignore[arg-type]
