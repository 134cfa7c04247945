"""The suite that ships with qwenq: right answers, no doubles, large enough, small on disk."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from qwenq.evals.task import Choose, DataSource, Item, Write, Written
from qwenq.evals.tasks.data import SAMPLE
from qwenq.evals.tasks.humaneval import program
from qwenq.evals.tasks.registry import get_task, protocol_names

SOURCE = DataSource(sample=True)
canonical: Any = get_task("humaneval", "base").reference


@pytest.mark.parametrize(("name", "least"), [("mmlu", 100), ("ceval", 100), ("gsm8k", 40), ("humaneval", 40)])
def test_every_protocol_runs_on_it(name: str, least: int) -> None:
    for protocol in protocol_names(name):
        task = get_task(name, protocol)
        items = task.items(SOURCE)
        assert len(items) >= least
        assert len({item.id for item in items}) == len(items)
        prompts = [str(task.request(item).prompt) for item in items]
        assert len(set(prompts)) == len(prompts)
        assert all(len(item.shots) == task.shots for item in items)
        assert all(isinstance(task.request(item), Choose | Write) for item in items)


@pytest.mark.parametrize("name", ["mmlu", "ceval"])
def test_no_letter_is_favoured(name: str) -> None:
    items = get_task(name, "base").items(SOURCE)
    by_subject = Counter((item.subject, item.data["answer"]) for item in items)
    for subject in {item.subject for item in items}:
        counts = [by_subject[subject, letter] for letter in "ABCD"]
        assert max(counts) - min(counts) <= 1
    rows = [tuple(item.data[key] for key in ("question", *"ABCD")) for item in items]
    assert len(set(rows)) == len(rows)
    assert all(len({item.data[letter] for letter in "ABCD"}) == 4 for item in items)


@pytest.mark.parametrize("name", ["mmlu", "ceval"])
def test_quoted_letters_are_the_answers(name: str) -> None:
    """The answers of all subjects but everyday_things, whose every row was read by a person."""
    items = [item for item in get_task(name, "base").items(SOURCE) if item.subject != "everyday_things"]
    assert len(items) == 100
    for row in [item.data for item in items] + [shot for item in items for shot in item.shots]:
        assert set(re.findall(r"(?:Answer: |答案：)([ABCD])", row["question"])) == {row["answer"]}


def test_chinese_questions_are_chinese() -> None:
    for item in get_task("ceval", "base").items(SOURCE):
        assert re.search(r"[\u4e00-\u9fff＋]|[0-9][+-][0-9]", item.data["question"])


def test_the_sums_are_right() -> None:
    items = get_task("gsm8k", "base").items(SOURCE)
    for row in [item.data for item in items] + list(items[0].shots):
        a, sign, b, noted = re.search(r"<<(\d+)([-+*])(\d+)=(\d+)>>", row["answer"]).groups()  # type: ignore[union-attr]
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert row["answer"].endswith(f"\n#### {value}") and int(noted) == value
        assert [a, b] == re.findall(r"\d+", row["question"])


def run_all(items: list[Item], completions: list[str]) -> list[str]:
    """Ids of the problems that fail, all run in one other process: they are ours, and trusted."""
    made = [program(item, completion) for item, completion in zip(items, completions, strict=True)]
    code = "import sys\nfailed = []\n" + "".join(
        f"try:\n    exec({source.solution + chr(10) + source.tests!r}, {{}})\n"
        f"except BaseException:\n    failed.append({source.id!r})\n"
        for source in made
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "print(*failed)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.split()


def test_canonical_solutions_pass_and_empty_ones_do_not() -> None:
    items = get_task("humaneval", "base").items(SOURCE)
    assert run_all(items, [canonical(item) for item in items]) == []
    for nothing in ("    pass\n", "    return None\n", "    return 0\n", "    return True\n"):
        assert len(run_all(items, [nothing] * len(items))) == len(items)


def test_what_the_card_prompt_gets_back_is_what_was_written() -> None:
    task = get_task("humaneval", "card")
    items = task.items(SOURCE)
    answers = [f"```python\n{item.data['prompt']}{canonical(item)}```" for item in items]
    read = [
        task.judge(item, Written(text, 1, stopped=True)).extracted or ""
        for item, text in zip(items, answers, strict=True)
    ]
    assert run_all(items, read) == []


def test_it_says_what_it_is_not_and_is_small() -> None:
    assert "This is not MMLU" in (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*")) < 300_000


def test_base_answers_to_functions_begin_with_return_and_the_benchmarks_do_not() -> None:
    """Behind a docstring the bundled model writes nothing; with this it solves most of them."""
    task = get_task("humaneval", "base")
    item = task.items(SOURCE)[0]
    request = task.request(item)
    assert isinstance(request, Write)
    assert str(request.prompt).endswith('"""\n    return')
    found = task.judge(item, Written(" a + b\n```", 4, True))  # a chat model ends its block of code
    assert run_all([item], [found.extracted]) == []
    own = Item(item.id, None, {name: text for name, text in item.data.items() if name != "begin"})
    assert str(task.request(own).prompt) == item.data["prompt"]
    assert task.judge(own, Written("    return a + b\n", 4, True)).extracted == "    return a + b\n"
