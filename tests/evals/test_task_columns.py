"""MMLU-Pro, GPQA-diamond and MATH-500: prompts as published and as the harness has them, and errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from evals.columns_data import gpqa_rows, math500_rows, mmlu_pro_rows, write_columns, write_lines
from evals.golden_cases import LETTER_SUBJECT, SHOWN
from evals.record_golden import GOLDEN, digest

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import Choose, Chosen, DataSource, Item, Write, Written
from qwenq.evals.tasks import gpqa
from qwenq.evals.tasks.registry import get_task, protocol_names


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return DataSource(write_columns(tmp_path_factory.mktemp("columns")))


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / "columns.json").read_text(encoding="utf-8"))["found"][name]


def judged(task: str, protocol: str, item: Item, text: str) -> tuple[bool, str | None]:
    found = get_task(task, protocol).judge(item, Written(text, 1, stopped=True))
    return found.correct, found.extracted


@pytest.mark.parametrize("name", ["mmlu-pro", "math-500", "gpqa-diamond"])
def test_prompts_are_the_harness_s(name: str, source: DataSource) -> None:
    task = get_task(name, "lm-eval")
    subjects = [LETTER_SUBJECT] if name == "mmlu-pro" else []
    ours: list[Any] = []
    for item in task.items(source, subjects)[:SHOWN]:
        request = task.request(item)
        if isinstance(request, Choose):
            ours += [[digest(str(request.prompt)), choice] for choice in request.choices]
        else:
            ours.append([digest(str(request.prompt)), list(request.until)])
    assert ours == recorded(name)


@pytest.mark.parametrize(("name", "budget"), [("mmlu-pro", 2048), ("gpqa-diamond", 2048), ("math-500", 2048)])
def test_every_protocol_has_all_items_once(name: str, budget: int, source: DataSource) -> None:
    for protocol in protocol_names(name):
        task = get_task(name, protocol)
        items = task.items(source)
        assert len({item.id for item in items}) == len(items)
        assert task.notes(items) == []
        assert all(len(item.shots) == task.shots for item in items)
    request = get_task(name, "card").request(get_task(name, "card").items(source)[0])
    assert isinstance(request, Write) and request.max_new_tokens == budget


def test_prompts_of_mmlu_pro(source: DataSource) -> None:
    base, card = get_task("mmlu-pro", "base"), get_task("mmlu-pro", "card")
    item = base.items(source, ["computer_science"], 1)[0]
    assert item.id == "computer_science/0"
    question = "Question:\nWhich lamp shines? 0\nOptions:\nA. one\nB.  two \nC. three\nD. four. \n"
    start = "Answer: Let's think step by step."
    assert base.request(item).prompt == (
        "The following are multiple choice questions (with answers) about computer science. Think step by "
        'step and then finish your answer with "the answer is (X)" where X is the correct letter choice.'
        f"\n\n\n\n{question}{start} It is so. The answer is (A).\n\n{question}{start}"
    )
    chat = card.request(card.items(source, ["computer_science"])[0]).prompt[1]["content"]  # type: ignore[index]
    assert chat == (
        "Which lamp shines? 0\n\nA. one\nB.  two \nC. three\nD. four. \n\nPlease show your choice in "
        'the `answer` field with only the choice letter, e.g., `"answer": "C"`.'
    )


@pytest.mark.parametrize(("text", "card", "base", "harness"), [
    ('{"answer": "B"}', "B", "B", None),
    ('First "answer": "A", but then\n"answer": "J"', "J", "J", None),
    ("So the answer is (C). Not (D).", "C", "C", "C"),
    ("Answer: I", "I", "I", None),
    ("It may be A. Perhaps B", "B", "B", None),
    ("None at all", None, None, None),
    ("the answer is (K)", None, None, None),
    ("", None, None, None),
])  # fmt: skip
def test_letters_of_mmlu_pro(text: str, card: str, base: str, harness: str) -> None:
    item = Item("law/0", "law", {"answer": "C"})
    for protocol, letter in (("card", card), ("base", base), ("lm-eval", harness)):
        assert judged("mmlu-pro", protocol, item, text) == (letter == "C", letter)


def test_options_that_do_not_exist_are_skipped(tmp_path: Path) -> None:
    rows = mmlu_pro_rows("test", "history")
    rows[1]["options"] = ["one", "two", "N/A", "N/A"]
    write_lines(tmp_path / "mmlu-pro" / "test.jsonl", rows)
    task = get_task("mmlu-pro", "base")
    item = task.items(DataSource(tmp_path), ["history"], 0)[1]
    assert str(task.request(item).prompt).endswith("A. one\nB. two\nAnswer: Let's think step by step.")


@pytest.mark.parametrize(("change", "message"), [
    ({"options": ["a"] * 11}, "of 11 options"),
    ({"options": ["a"], "answer": "B"}, "the answer is 'B' of 1 options"),
    ({"options": "abc"}, "have to be a list"),
    ({"question": " "}, "the question is empty"),
])  # fmt: skip
def test_broken_rows_of_mmlu_pro(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = mmlu_pro_rows("test", "history")
    rows[2] |= change
    write_lines(tmp_path / "mmlu-pro" / "test.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        get_task("mmlu-pro", "card").items(DataSource(tmp_path), ["history"])
    assert str(caught.value.where).endswith("test.jsonl, line 3")


def test_files_that_were_cut_off(tmp_path: Path, source: DataSource) -> None:
    write_lines(tmp_path / "mmlu-pro" / "test.jsonl", mmlu_pro_rows("test", "history")[:-1])
    write_lines(tmp_path / "math-500" / "test.jsonl", math500_rows()[:-1])
    assert source.folder is not None
    table = (source.folder / "gpqa" / "gpqa_diamond.csv").read_text(encoding="utf-8")
    (tmp_path / "gpqa").mkdir()
    (tmp_path / "gpqa" / "gpqa_diamond.csv").write_text(
        table[: table.rindex("Which lamp")].rpartition("\n")[0]
    )
    for name, subjects in (("mmlu-pro", ["history"]), ("math-500", []), ("gpqa-diamond", [])):
        with pytest.raises(DataError, match=r"\d+ rows where the published set has"):
            get_task(name, "card").items(DataSource(tmp_path), subjects)


@pytest.mark.parametrize("name", ["mmlu-pro", "gpqa-diamond", "math-500"])
def test_unknown_subjects_and_missing_data(name: str, source: DataSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} has no subject 'alchemy'"):
        get_task(name, "card").items(source, ["alchemy"])
    with pytest.raises(DataError, match="data there"):
        get_task(name, "card").items(DataSource(tmp_path))
    with pytest.raises(DataError, match="the sample suite has no"):
        get_task(name, "card").items(DataSource(sample=True))


def test_options_of_gpqa_are_shuffled_alike_in_every_run(source: DataSource) -> None:
    items = get_task("gpqa-diamond", "card").items(source)
    assert items == get_task("gpqa-diamond", "base").items(source)
    assert items[1::3] == get_task("gpqa-diamond", "card").items(source, ["chemistry"])
    places = Counter(item.data["answer"] for item in items)
    assert set(places) == set("ABCD") and min(places.values()) > 30, "no letter is favoured"
    for item, row in zip(items, gpqa_rows(), strict=True):
        assert item.data[item.data["answer"]] == row[gpqa.RIGHT]
        assert {item.data[letter] for letter in "ABCD"} == {row[name] for name in (gpqa.RIGHT, *gpqa.WRONG)}
    assert gpqa.shuffled("Which lamp shines? 0", "abcd") == [3, 0, 2, 1], "recorded: it must never change"


def test_prompts_and_letters_of_gpqa(source: DataSource) -> None:
    base = get_task("gpqa-diamond", "base")
    item = base.items(source)[0]
    shown = {letter: item.data[letter] for letter in "ABCD"}
    assert base.request(item).prompt == (
        "What is the correct answer to this question: Which lamp shines? 0\n\nChoices:\n"
        f"(A) {shown['A']}\n(B) {shown['B']}\n(C) {shown['C']}\n(D) {shown['D']}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)"'
    )
    asked = get_task("gpqa-diamond", "card").request(item).prompt[1]["content"]  # type: ignore[index]
    assert asked == (
        f"Which lamp shines? 0\n\nA. {shown['A']}\nB. {shown['B']}\nC. {shown['C']}\nD. {shown['D']}\n\n"
        'Please show your choice in the `answer` field with only the choice letter, e.g., `"answer": "C"`.'
    )
    item = Item("physics/2", "physics", {**dict.fromkeys("ABCD", "?"), "answer": "B"})
    for text, card, plain in (
        ('"answer": "B"', "B", None),
        ("The correct answer is (B)", "B", "B"),
        ("(A) is wrong, so the answer is (B).", "B", "B"),
        ("(B) and (C)", "B", "B"),
        ("The answer is (E). Answer: (A)", "A", "A"),
        ("I do not know", None, None),
    ):
        assert judged("gpqa-diamond", "card", item, text) == (card == "B", card)
        assert judged("gpqa-diamond", "base", item, text) == (plain == "B", plain)
    chosen = Chosen((-2.0, -1.0, -1.0, -9.0), (0.2, 0.3, 0.3, 0.2))
    assert get_task("gpqa-diamond", "lm-eval").judge(item, chosen).correct


def test_prompts_and_answers_of_math_500(source: DataSource) -> None:
    card, harness = get_task("math-500", "card"), get_task("math-500", "lm-eval")
    item = next(item for item in card.items(source) if item.id == "counting_and_probability/1")
    asked = card.request(item).prompt[1]["content"]  # type: ignore[index]
    assert asked == (
        "  Two lines,\nand the second asks: which?  1\n"
        "Please reason step by step, and put your final answer within \\boxed{}."
    )
    assert str(get_task("math-500", "base").request(item).prompt).endswith("  1\n\nSolution:")
    for text, right in ((r"so \boxed{\dfrac17}", True), (r"\boxed{1/7}", True), (r"\boxed{2/7}", False)):
        assert judged("math-500", "card", item, text)[0] is right
    assert judged("math-500", "card", item, "no box") == (False, None)
    for text, right in (
        (r"$\frac{1}{7}$", True),
        (r"It is $\frac{1}{7}$.", True),
        ("1/7", True),
        ("7", False),
    ):
        assert harness.judge(item, Written(text, 1, stopped=True)).correct is right
