"""MATH: both layouts, Minerva's form of prompt, and the answer that is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import DataSource, Item, Write, Written
from qwenq.evals.tasks.math import COUNTS, EXAMPLES, SHOT, boxed, same_answer
from qwenq.evals.tasks.registry import get_task, protocol_names

TASK = get_task("math", "base")


def problem(number: int) -> dict[str, str]:
    return {
        "problem": f"What is ${number} + 1$?",
        "level": "Level 1",
        "type": "Counting & Probability",
        "solution": f"One more: $\\boxed{{{number + 1}}}$.",
    }


def write_math(data: Path, count: int = 474) -> DataSource:
    folder = data / "math" / "test" / "counting_and_probability"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.json").write_text(json.dumps(problem(number)))
    return DataSource(data)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return TASK.items(write_math(tmp_path_factory.mktemp("math")), ["counting_and_probability"])


def test_files_in_order_of_their_numbers(items: list[Item]) -> None:
    assert [item.id.rpartition("/")[2] for item in items] == [str(n) for n in range(474)]
    assert items[11].data["answer"] == "12"
    assert TASK.notes(items) == ["1 of the 7 subjects of math: not comparable with a score over all of them"]
    assert TASK.notes([Item(f"{subject}/0", subject, {}) for subject in COUNTS]) == []


def test_the_prompt_has_minervas_form(items: list[Item]) -> None:
    request = TASK.request(items[7])
    assert isinstance(request, Write) and "Problem:" in request.until
    assert isinstance(request.prompt, str)
    assert request.prompt.startswith("Problem:\nFor which real $x$")
    assert request.prompt.count("Final Answer: The final answer is $") == 4
    assert request.prompt.endswith("I hope it is correct.\n\nProblem:\nWhat is $7 + 1$?\n\nSolution:")


def test_the_examples_are_right_by_their_own_boxes() -> None:
    for row in EXAMPLES:
        box = boxed(row["solution"])
        assert box is not None and same_answer(box, row["answer"])
        written = Written(SHOT.format_map(row).partition("Solution:")[2], 1, stopped=True)
        assert TASK.judge(Item("x/0", "x", {"answer": row["answer"]}), written).correct


@pytest.mark.parametrize(
    ("text", "correct", "found"),
    [
        (" It is 8.\nFinal Answer: The final answer is $8$. ", True, "$8$"),
        (" It is $\\boxed{8.0}$.", True, "8.0"),
        (" $\\boxed{8}$\nFinal Answer: The final answer is $9$. ", False, "$9$"),
        (" 8", False, None),
        ("", False, None),
    ],
)
def test_the_answer_that_is_read(items: list[Item], text: str, correct: bool, found: str | None) -> None:
    judgement = TASK.judge(items[7], Written(text, 1, stopped=True))
    assert (judgement.correct, judgement.extracted) == (correct, found)


def test_the_other_layouts_give_the_same_items(
    items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math").mkdir()
    text = "".join(json.dumps(problem(number)) + "\n" for number in range(474))
    (tmp_path / "math" / "test.jsonl").write_text(text)
    assert TASK.items(DataSource(tmp_path), ["counting_and_probability"]) == items
    with pytest.raises(DataError, match="0 rows where the published set has 1187"):
        TASK.items(DataSource(tmp_path))
    hub = SimpleNamespace(load_dataset=lambda *_, **__: [problem(number) for number in range(474)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert TASK.items(DataSource(), ["counting_and_probability"]) == items


def test_what_is_refused(tmp_path: Path) -> None:
    source = write_math(tmp_path, 473)
    with pytest.raises(DataError, match="473 rows where the published set has 474"):
        TASK.items(source, ["counting_and_probability"])
    with pytest.raises(DataError, match="no such benchmark file"):
        TASK.items(source, ["algebra"])
    with pytest.raises(UsageError, match="math has no subject 'algebr'"):
        TASK.items(source, ["algebr"])
    path = tmp_path / "math" / "test" / "counting_and_probability" / "473.json"
    path.write_text(json.dumps({**problem(1), "solution": "no box"}))
    with pytest.raises(DataError, match="no boxed answer") as caught:
        TASK.items(source, ["counting_and_probability"])
    assert caught.value.where == str(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        TASK.items(source, ["counting_and_probability"])


def test_it_has_no_protocol_for_chat_models() -> None:
    assert protocol_names("math") == protocol_names("bbh") == ["base"]
    with pytest.raises(UsageError, match="math has no card protocol") as caught:
        get_task("math", "card")
    assert caught.value.hint == "it has base: --protocol base"


def test_published_counts() -> None:
    assert sum(filter(None, COUNTS.values())) == 5000
