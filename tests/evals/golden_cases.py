"""Questions, answers and texts made up for tests, which other programs have judged: see record_golden.py."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

SUBJECT = "astronomy"
SHOWN = 24
"""Items whose prompts are recorded; all that are odd are among them."""

QUESTIONS = [
    "Which lamp shines?",
    "  A question with room around it.  ",
    "Two lines,\nand the second asks: which?",
    'She said: "a, b" – and then?',
    "哪一盏灯亮着？",
    "A tab\there, a brace {here}, a percent 5%s \\n there",
    "Trailing line end\n",
    "___ is what is missing.",
]
OPTIONS = [
    ("None", "NA", "nan", "null"),
    (" left", "right ", " both ", "neither"),
    ("1,234", "-3", "007", "3.50"),
    ("红色", "蓝色，", "绿色。", "以上都不是"),
    ("a\nb", "{A}", "A", "B. C"),
]
SOLUTIONS = [
    "Two and two are <<2+2=4>>4.\n#### 4",
    "No note at all\n#### 1,234",
    "He owes <<3-10=-7>>-7 dollars.\n#### -7",
    "A price of $3.50.\n#### 3.50",
    "Line one\nLine two {braces} 5%\n#### 18",
]
ANSWERS = [
    "",
    "no number",
    "#### {0}",
    "####{0}",
    "#### {0}.",
    "#### ${0}",
    "#### {0} dollars",
    "#### {0}%",
    "#### {0},",
    "#### {0}.00",
    "#### -{0}",
    "#### 99\n#### {0}",
    "#### {0}\n#### 99",
    "The answer is {0}",
    "The answer is {0}.",
    "The answer is ${0}.",
    "It is 99, and so {0}",
    "It is {0}, and so 99",
    "so {0} of 5",
    "#### five and {0}",
    "12 eggs.\nThen {0} eggs.\n",
    "#### 0{0}",
    "$ {0}",
    "...",
    "{0}{0}",
    "#### {0} #### {0}",
    "####  {0}",
    "### {0}",
]
"""``{0}`` is the right number as the solution has it."""

WORDS = ["the", "of", "Münster", "café", "×2", "50%", "(x+y)", "北京", "上海，", "。", "1,234", "NaN", "None"]
WORDS += ["naïve", "re-entry", "\n", "\t", "A", "B", "", "THE", "ﬁne", "e\u0301", "İstanbul", "ß"]


def mmlu_rows(count: int) -> list[tuple[str, ...]]:
    """Question, four options, answer."""
    return [
        (
            f"{QUESTIONS[n % len(QUESTIONS)]}{n // len(QUESTIONS) or ''}",
            *OPTIONS[n % len(OPTIONS)],
            "ABCD"[n * 7 % 4],
        )
        for n in range(count)
    ]


def gsm8k_rows(count: int) -> list[dict[str, str]]:
    """Question and solution, whose last line has the number."""
    return [
        {
            "question": f"{QUESTIONS[n % len(QUESTIONS)]} {n}",
            "answer": SOLUTIONS[n % len(SOLUTIONS)],
        }
        for n in range(count)
    ]


def write_data(data: Path) -> Path:
    """Both in the original layouts, with as many rows as these have."""
    for split, count in (("dev", 5), ("test", 152)):
        path = data / "mmlu" / split / f"{SUBJECT}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(mmlu_rows(count))
    (data / "gsm8k").mkdir(exist_ok=True)
    for split, count in (("train", 7473), ("test", 1319)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in gsm8k_rows(count))
        (data / "gsm8k" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return data


def gsm8k_answers() -> list[tuple[int, str]]:
    """(Item, what a model might have written): every answer to every solution."""
    numbers = [solution.rsplit("#### ", 1)[1] for solution in SOLUTIONS]
    return [(item, answer.format(number)) for item, number in enumerate(numbers) for answer in ANSWERS]


def texts_and_options(count: int = 400) -> list[tuple[str, list[str]]]:
    """A text and four options, of words that clean-ups treat differently."""
    drawn = random.Random(0)
    found = []
    for _ in range(count):
        options = [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 5))) for _ in range(4)]
        found.append((" ".join(drawn.choices(WORDS, k=drawn.randint(0, 30))), options))
    return found
