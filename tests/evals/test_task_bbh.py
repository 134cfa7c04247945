"""BIG-Bench Hard: the authors' examples before every question, and exact answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import DataSource, Item, Judgement, Write, Written
from qwenq.evals.tasks.bbh import COUNTS
from qwenq.evals.tasks.registry import get_task

TASK = get_task("bbh", "base")
EXAMPLES = "Count.\n\n" + "\n\n".join(
    f"Q: How many are {n} and 1?\nA: Let's think step by step.\n{n} + 1 is {n + 1}. So the answer is {n + 1}."
    for n in range(3)
)


def write_bbh(data: Path, task: str = "snarks", rows: int = 178, inner: str = "bbh/bbh") -> DataSource:
    (data / inner).mkdir(parents=True, exist_ok=True)
    (data / "bbh" / "cot-prompts").mkdir(exist_ok=True)
    examples = [{"input": f"Which, {{0}} or {n}?\nOptions:\n(A) 0", "target": "(A)"} for n in range(rows)]
    (data / inner / f"{task}.json").write_text(json.dumps({"canary": "x", "examples": examples}))
    head = "a note to whoever trains models\n-----\n"
    (data / "bbh" / "cot-prompts" / f"{task}.txt").write_text(head + EXAMPLES + "\n")
    return DataSource(data)


def test_every_question_follows_its_tasks_examples(tmp_path: Path) -> None:
    items = TASK.items(write_bbh(tmp_path), ["snarks"])
    assert (len(items), items[3].id, items[3].subject) == (178, "snarks/3", "snarks")
    assert TASK.notes(items) == ["1 of the 27 subjects of bbh: not comparable with a score over all of them"]
    question = "\n\nQ: Which, {0} or 3?\nOptions:\n(A) 0\nA: Let's think step by step.\n"
    assert TASK.request(items[3]) == Write(EXAMPLES + question, 1024, ("\n\n", "Q:"))
    assert TASK.items(write_bbh(tmp_path / "flat", inner="bbh"), ["snarks"]) == items


@pytest.mark.parametrize(
    ("text", "target", "correct"),
    [
        ("Hence. So the answer is (A).", "(A)", True),
        ("So the answer is (A)", "(A)", True),
        ("So the answer is (a).", "(A)", False),
        ("So the answer is (A) or (B).", "(A)", False),
        ("The answer is ] ) ).", "] ) )", True),
        ("So the answer is valid. More", "valid", False),
        ("So the answer is No.\nSo the answer is Yes.", "No", True),
        ("It is (A).", "(A)", False),
        ("", "(A)", False),
    ],
)
def test_the_answer_has_to_be_exact(text: str, target: str, correct: bool) -> None:
    item = Item("snarks/0", "snarks", {"input": "?", "answer": target})
    assert TASK.judge(item, Written(text, 1, stopped=True)).correct == correct


def test_line_ends_of_windows_are_no_other_prompt(tmp_path: Path) -> None:
    """A copy of the repository that was checked out there."""
    items = TASK.items(write_bbh(tmp_path), ["snarks"])
    path = tmp_path / "bbh" / "cot-prompts" / "snarks.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert TASK.items(DataSource(tmp_path), ["snarks"]) == items


def test_tasks_count_alike() -> None:
    judged = [
        (Item(f"{name}/{n}", name, {}), Judgement(n < right, ""))
        for name, right, of in (("snarks", 1, 4), ("navigate", 1, 1))
        for n in range(of)
    ]
    (score,) = TASK.scores(judged)
    assert score.macro and score.value == pytest.approx(0.625)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="177 rows where the published set has 178"):
        TASK.items(write_bbh(tmp_path, rows=177), ["snarks"])
    with pytest.raises(DataError, match="no such benchmark file"):
        TASK.items(write_bbh(tmp_path))
    with pytest.raises(UsageError, match="no subject 'snark'") as caught:
        TASK.items(write_bbh(tmp_path), ["snark"])
    assert caught.value.hint == "did you mean snarks?"
    with pytest.raises(UsageError, match="cannot show 0 examples"):
        TASK.items(write_bbh(tmp_path), ["snarks"], shots=0)
    path = tmp_path / "bbh" / "cot-prompts" / "snarks.txt"
    path.write_text(EXAMPLES.rpartition("\n\n")[0])
    with pytest.raises(DataError, match="2 worked examples where there should be 3"):
        TASK.items(DataSource(tmp_path), ["snarks"])
    (tmp_path / "bbh" / "bbh" / "snarks.json").write_text("[]")
    with pytest.raises(DataError, match="a list of rows"):
        TASK.items(DataSource(tmp_path), ["snarks"])


def test_the_hub_is_no_way_to_it() -> None:
    with pytest.raises(DataError, match="not on the hub") as caught:
        TASK.items(DataSource())
    assert caught.value.hint is not None and "--data DIR" in caught.value.hint


def test_published_counts() -> None:
    assert len(COUNTS) == 27 and sum(filter(None, COUNTS.values())) == 6511
