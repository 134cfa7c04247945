"""GSM8K: prompts as published, and numbers as each protocol reads them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from qwenq.errors import DataError
from qwenq.evals.task import DataSource, Item, Write, Written
from qwenq.evals.tasks.gsm8k import last_number, load
from qwenq.evals.tasks.registry import get_task

CARD, BASE, HARNESS = (get_task("gsm8k", protocol) for protocol in ("card", "base", "lm-eval"))
SHOT = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\nSo 2.\n#### 2"}

PUBLISHED_PROMPT = "b067972c3ba476496af49bacfc2ade83e4bc72c47a52f7f0e70d7d9e8f573e0d"
"""sha256 of gsm8k_prompt.txt in QwenLM/Qwen, 4,047 characters, all of it text of GSM8K's train split."""


def item(gold: str, *shots: dict[str, str]) -> Item:
    return Item("test/0", None, {"question": "How many?", "answer": f"Well, 3.\n#### {gold}"}, shots)


def said(text: str) -> Written:
    return Written(text, tokens=len(text), stopped=True)


def test_the_chat_prompt_is_the_bare_question() -> None:
    request = CARD.request(item("5"))
    assert isinstance(request, Write)
    assert request.prompt[0] == {"role": "system", "content": "You are a helpful assistant."}
    assert request.prompt[1] == {"role": "user", "content": "How many?"}
    assert (request.max_new_tokens, request.until) == (512, ())


def test_examples_lose_their_calculator_notes() -> None:
    shown = "Question: 1+1?\nLet's think step by step\nIt is 2.\nSo 2.\nThe answer is 2\n\n"
    question = "Question: How many?\nLet's think step by step"
    assert BASE.request(item("5", SHOT)).prompt == f"{shown}{question}\n"
    assert CARD.request(item("5", SHOT)).prompt[1]["content"] == shown + question  # type: ignore[index]


def test_the_base_answer_ends_where_the_script_cuts_it() -> None:
    request = BASE.request(item("5"))
    assert isinstance(request, Write)
    assert (request.max_new_tokens, request.until) == (512, ("<|endoftext|>", "\n\n", "Question:"))


def test_the_harness_prompt_keeps_its_examples_as_they_are() -> None:
    request = HARNESS.request(item("5", SHOT))
    assert request == Write(
        "Question: 1+1?\nAnswer: It is <<1+1=2>>2.\nSo 2.\n#### 2\n\nQuestion: How many?\nAnswer:",
        256,
        ("Question:", "</s>", "<|im_end|>"),
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.", "1234."),
        ("$20.50.", "20.50"),
        ("he has 12 left, not 13", "13"),
        ("-5 degrees", "-5"),
        ("+7", "7"),
        (".5 of it", ".5"),
        ("1,234,567", "1234567"),
        ("step 007", "007"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("gold", "text", "card", "base"),
    [
        ("1,234", "It is 1,234.", True, False),  # base: digits only, so 234
        ("1234", "It is 1234", True, True),
        ("20", "$20.00", True, False),  # base: 00, which Python reads as 0
        ("20.5", "$20.50.", True, False),
        ("7", "agent 007", False, False),  # Python has no 007
        ("0", "0", True, True),
        ("0", "000", True, True),  # but 000 it has
        ("-5", "it was -5", True, False),
        ("5", "- 5", True, True),
        ("5", "5.00009", True, False),
        ("5", "5.001", False, False),
        ("5", "I do not know", False, False),
        ("5", "", False, False),
        ("12", "答案：12。", True, True),
        ("12", "答案：１２", False, False),  # full-width digits are no Python number
        ("10", "9" * 400, False, False),
    ],
)
def test_which_numbers_are_right(gold: str, text: str, card: bool, base: bool) -> None:
    assert CARD.judge(item(gold), said(text)).correct is card
    assert BASE.judge(item(gold), said(text)).correct is base


def test_why_an_answer_counts_as_wrong() -> None:
    assert CARD.judge(item("7"), said("no idea")).note == "no number in the answer"
    judgement = CARD.judge(item("7"), said("agent 007"))
    assert (judgement.extracted, judgement.note) == (
        "007",
        "not a number in Python, hence wrong in the published score",
    )


@pytest.mark.parametrize(
    ("gold", "text", "strict", "flexible"),
    [
        ("1,234", "so\n#### 1,234", True, True),
        ("1234", "#### 1,234.", True, True),
        ("12", "The answer is 12.", False, True),
        ("12", "#### 12\nor #### 13", True, False),  # strict: the first; flexible: the last
        ("12", "####12", False, True),
        ("5", "#### 007", False, False),
        ("20", "#### 20.00", False, False),  # compared as text
        ("20", "it costs $20", False, True),
        ("5", "", False, False),
        ("5", "no number.", False, False),
    ],
)
def test_strict_and_flexible(gold: str, text: str, strict: bool, flexible: bool) -> None:
    judgement = HARNESS.judge(item(gold), said(text))
    assert (judgement.correct, judgement.also["flexible"]) == (strict, flexible)
    assert [score.metric for score in HARNESS.scores([(item(gold), judgement)])] == [
        "accuracy",
        "accuracy.flexible",
    ]


def test_examples_that_the_train_split_lacks(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    row = '{"question": "q", "answer": "a\\n#### 1"}\n'
    (tmp_path / "gsm8k" / "test.jsonl").write_text(row * 1319, encoding="utf-8")
    (tmp_path / "gsm8k" / "train.jsonl").write_text(row * 7473, encoding="utf-8")
    with pytest.raises(DataError, match="8 of the examples") as caught:
        BASE.items(DataSource(folder=tmp_path))
    assert str(caught.value.where).endswith("train.jsonl")
    (tmp_path / "gsm8k" / "test.jsonl").write_text(row * 5 + '{"question": "q", "answer": "a"}\n' * 1314)
    with pytest.raises(DataError, match="does not end with its number") as caught:
        CARD.items(DataSource(folder=tmp_path))
    assert str(caught.value.where).endswith("test.jsonl, line 6")


@pytest.mark.parametrize("number", [",", ".", "1.2.3", "-"])
def test_an_answer_that_nobody_can_give_is_refused(tmp_path: Path, number: str) -> None:
    (tmp_path / "gsm8k").mkdir()
    rows = '{"question": "q", "answer": "a\\n#### 1"}\n' * 1318
    last = f'{{"question": "q", "answer": "a\\n#### {number}"}}\n'
    (tmp_path / "gsm8k" / "test.jsonl").write_text(rows + last, encoding="utf-8")
    with pytest.raises(DataError, match="does not end with its number") as caught:
        CARD.items(DataSource(folder=tmp_path))
    assert str(caught.value.where).endswith("line 1319")


def test_an_example_without_steps_is_refused(tmp_path: Path) -> None:
    question = "q"
    name = hashlib.sha256(question.encode()).hexdigest()[:16]
    task = replace(BASE, load=partial(load, (name,) * 8))
    (tmp_path / "gsm8k").mkdir()
    row = '{"question": "q", "answer": "#### 1"}\n'
    for split, count in (("test", 1319), ("train", 7473)):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(row * count, encoding="utf-8")
    with pytest.raises(DataError, match="no steps before its number") as caught:
        task.items(DataSource(folder=tmp_path))
    assert str(caught.value.where).endswith("train.jsonl")


def test_the_published_prompt_to_the_byte(shared_data: Path) -> None:
    first = BASE.items(DataSource(folder=shared_data))[0]
    prompt = str(BASE.request(first).prompt)
    header = prompt[: prompt.index(f"\nQuestion: {first.data['question']}")]
    assert hashlib.sha256(header.encode()).hexdigest() == PUBLISHED_PROMPT
    chat = CARD.items(DataSource(folder=shared_data), shots=4)[0]
    assert [shot["answer"].rsplit(" ", 1)[1] for shot in chat.shots] == ["4", "201", "140", "146"]


def test_the_harness_draws_other_examples_for_each_item(shared_data: Path) -> None:
    items = HARNESS.items(DataSource(folder=shared_data))
    assert items[0].shots != items[1].shots
    assert items[:3] == HARNESS.items(DataSource(folder=shared_data))[:3]
