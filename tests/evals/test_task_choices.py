"""How an answer to a question with four options is read, and what it scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from evals.columns_data import write_lines

from qwenq.errors import DataError
from qwenq.evals.task import Choose, Chosen, DataSource, Item, Judgement, Task, Write, Written, score_all
from qwenq.evals.tasks.choices import judge_choice, lettered
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row
from qwenq.evals.tasks.registry import get_task

CARD, BASE, HARNESS = (get_task("mmlu", protocol) for protocol in ("card", "base", "lm-eval"))
ZH_CARD, ZH_BASE = (get_task("ceval", protocol) for protocol in ("card", "base"))

SHOT = {"question": " 1+1? ", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
CAPITAL = {
    "question": "Capital of France?",
    "A": "Rome",
    "B": "Paris.",
    "C": "None",
    "D": "N/A",
    "answer": "B",
}
ITEM = Item("world_facts/0", "world_facts", CAPITAL, (SHOT,))
ZH = {
    "id": "3",
    "question": "热身。关于传输层的面向连接服务的特性是____。",
    "A": "既不保证可靠，也不保证按序交付",
    "B": "不保证可靠，但保证按序交付",
    "C": "保证可靠，但不保证按序交付",
    "D": "既保证可靠，也保证按序交付",
    "answer": "D",
}
ZH_ITEM = Item("computer_network/3", "computer_network", ZH, (ZH,))


def said(text: str) -> Written:
    return Written(text, tokens=len(text), stopped=True)


def read(text: str, item: Item = ITEM) -> str | None:
    return (ZH_CARD if "id" in item.data else CARD).judge(item, said(text)).extracted


def test_the_chat_prompt() -> None:
    request = CARD.request(ITEM)
    assert isinstance(request, Write) and (request.max_new_tokens, request.until) == (512, ())
    assert list(request.prompt) == [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": "The following is a multiple-choice question. Please choose the most suitable one "
            "among A, B, C and D as the answer to this question.\n\n"
            "Capital of France?\nA. Rome\nB. Paris.\nC. None\nD. N/A\n",
        },
    ]


def test_the_base_prompt() -> None:
    assert BASE.request(ITEM) == Choose(
        "The following are multiple choice questions (with answers) about world facts.\n\n"
        "Question:  1+1? \nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Question: Capital of France?\nA. Rome\nB. Paris.\nC. None\nD. N/A\nAnswer:",
        (" A", " B", " C", " D"),
    )


def test_the_harness_prompt() -> None:
    assert HARNESS.request(ITEM) == Choose(
        "The following are multiple choice questions (with answers) about world facts.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
        "Capital of France?\nA. Rome\nB. Paris.\nC. None\nD. N/A\nAnswer:",
        (" A", " B", " C", " D"),
    )


def test_the_chinese_prompts() -> None:
    options = "".join(f"{letter}. {ZH[letter]}\n" for letter in "ABCD")
    chat = ZH_CARD.request(ZH_ITEM)
    assert isinstance(chat, Write)
    assert chat.prompt[1]["content"] == f"{ZH['question']}\n\n{options}"  # type: ignore[index]
    question = f"问题：{ZH['question']}\n{options}答案："
    assert ZH_BASE.request(ZH_ITEM) == Choose(f"{question}D\n\n{question}", ("A", "B", "C", "D"))


def test_braces_and_percent_signs_in_a_question_are_text() -> None:
    odd = Item("x/0", "x", {**CAPITAL, "question": "{A} {0} %s {"}, ())
    assert "Question: {A} {0} %s {\nA. Rome" in str(BASE.request(odd).prompt)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is D.", "D"),
        ("I would choose C", "C"),
        ("The correct choice would be: C", "C"),
        ("The answer isn't A. Hence D is correct.", "D"),
        ("The answer is not A; it is B", "A"),  # as published: "answer" is skipped, the first letter is taken
        ("A is not correct, but C is right", "C"),
        ("D, of course", "D"),
        ("D", "D"),
        ("As C=O has a double bond: C", "C"),  # the letter of a formula is none
        ("It must be paris", "B"),  # the option's text, whatever its case
        ("Paris. is the place", "B"),
        ("NONE of them", "C"),
        ("n/a", "D"),
        ("Romme", "A"),  # no option and no letter, but most like one
    ],
)
def test_the_letter_of_an_english_answer(text: str, letter: str) -> None:
    assert read(text) == letter


def test_an_answer_without_a_letter() -> None:
    """The published script always takes an option, the first when nothing is alike; the note says so."""
    for text in ("", "。", "zzz", "\n"):
        judgement = CARD.judge(ITEM, said(text))
        assert judgement.extracted == "A" and not judgement.correct
        assert judgement.note == "no letter in the answer: the option most like its text"


def test_longer_options_are_replaced_first() -> None:
    row = {**CAPITAL, "A": "cell", "B": "cell wall", "C": "wall", "D": "x", "answer": "B"}
    assert read("It is the cell wall", Item("x/0", "x", row)) == "B"


def test_special_characters_of_an_option_are_text() -> None:
    row = {**CAPITAL, "A": "x^2 (a+b)", "B": "[0-9]*", "C": r"\d", "D": "...", "answer": "B"}
    assert read("The result: [0-9]*", Item("x/0", "x", row)) == "B"
    assert read("", Item("x/0", "x", row)) == "A"  # an option of dots is in no answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("答案是C。", "C"),
        ("答案：C", "C"),
        ("答案为：B，因为", "B"),
        ("应该选B选项", "B"),
        ("选择：A", "A"),
        ("A选项不正确，C选项正确。", "C"),
        ("（D）", "D"),
        ("D）既保证可靠", "D"),
        ("关于传输层的面向连接服务的特性是既保证可靠，也保证按序交付", "D"),
        ("特性在于不保证可靠，但保证按序交付。", "B"),
        ("答案不是A，是C", "A"),  # as published: the negation is skipped, then the first letter is taken
        ("可靠且按序", "A"),  # as published: all four are as like it, and the first is taken
        ("B和C都不对，所以答案是A ", "A"),  # white space around an answer is taken away
        ("\n D。", "D"),
    ],
)
def test_the_letter_of_a_chinese_answer(text: str, letter: str) -> None:
    assert read(text, ZH_ITEM) == letter


def test_likeliest_letter_and_published_tie() -> None:
    answer = Chosen(logprobs=(-1.204, -1.184, -1.6, -1.66), published=(0.2637, 0.2637, 0.2373, 0.2354))
    item = Item("x/0", "x", {**CAPITAL, "answer": "B"})
    judgement = BASE.judge(item, answer)
    assert (judgement.correct, judgement.extracted, dict(judgement.also)) == (True, "B", {"published": False})
    assert HARNESS.judge(item, answer) == Judgement(True, "B")


def test_micro_and_macro_averages() -> None:
    def judged(subject: str, right: int, of: int, published: int) -> list[tuple[Item, Judgement]]:
        return [
            (
                Item(f"{subject}/{n}", subject, CAPITAL),
                Judgement(n < right, "A", also={"published": n < published}),
            )
            for n in range(of)
        ]

    some = judged("anatomy", 1, 4, 2) + judged("virology", 1, 1, 0) + judged("law", 0, 5, 0)
    main, published = BASE.scores(some)
    assert (main.metric, main.value, main.macro, len(main.verdicts)) == ("accuracy", 0.2, False, 10)
    assert main.parts == {"anatomy": 0.25, "virology": 1.0, "law": 0.0}
    assert main.categories == {"stem": 0.25, "other": 1.0}
    assert (published.metric, published.value) == ("accuracy.published", 0.2)
    subjects = judged("law", 1, 4, 2) + judged("college_physics", 1, 1, 0) + judged("marxism", 0, 5, 0)
    main = ZH_BASE.scores(subjects)[0]
    assert main.macro and main.value == pytest.approx((0.25 + 1 + 0) / 3)
    assert main.categories == {"stem": 1.0, "social science": 0.0, "humanities": 0.25, "hard": 1.0}
    assert score_all([(ITEM, Judgement(True, "B"))])[0].value == 1.0
    assert BASE.scores([]) == []


def science(count: int) -> dict[str, str]:
    """Return a question with so many options, as ARC has three, four or five, and MMLU-Pro up to ten."""
    options = dict(zip("ABCDEFGHIJ", (f"option {n}" for n in range(count)), strict=False))
    return {"question": "Which?", **options, "answer": "ABCDEFGHIJ"[count - 1]}


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_letters_are_as_many_as_a_question_has_options(count: int) -> None:
    """Scored by their probability; the protocol is MMLU's, nothing but the rows differs."""
    item = Item("science/0", "science", science(count), (science(3),))
    letters = "ABCDEFGHIJ"[:count]
    request = BASE.request(item)
    assert isinstance(request, Choose) and request.choices == tuple(f" {letter}" for letter in letters)
    assert isinstance(request.prompt, str)
    shown = "".join(f"{letter}. option {n}\n" for n, letter in enumerate(letters))
    assert request.prompt.endswith(f"C. option 2\nAnswer: C\n\nQuestion: Which?\n{shown}Answer:")
    logprobs = tuple(float(n) for n in range(count))
    assert BASE.judge(item, Chosen(logprobs, ())) == Judgement(True, letters[-1])
    assert BASE.judge(item, Chosen(logprobs[::-1], logprobs)).also == {"published": True}


def test_a_set_with_three_to_five_options_is_a_dataset_and_a_task(tmp_path: Path) -> None:
    def make(row: Row, _: str | None) -> Item:
        data = row.data
        return Item("", None, lettered(data["question"], data["options"], data["answer"], row.where))

    rows = [{"question": f"{n}?", "options": list("uvwxy"[:n]), "answer": "C"} for n in (3, 4, 5)]
    write_lines(tmp_path / "arc" / "test.jsonl", rows)
    arc = Dataset(name="arc", make=make, counts={None: 3}, hub="owner/arc")
    task = Task(
        "arc", "base", 1, arc.load, "{question}\n{options}\nAnswer:", judge_choice, choices=" {letter}"
    )
    items = task.items(DataSource(tmp_path))
    assert [len(task.request(item).choices) for item in items] == [3, 4, 5]  # type: ignore[union-attr]
    rows[1]["answer"] = "E"
    write_lines(tmp_path / "arc" / "test.jsonl", rows)
    with pytest.raises(DataError, match="the answer is 'E' of 4 options") as caught:
        task.items(DataSource(tmp_path))
    assert str(caught.value.where).endswith("test.jsonl, line 2")
