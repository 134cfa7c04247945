"""Questions, answers and texts made up for tests, which other programs have judged: see record_golden.py."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

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


LETTER_SUBJECT = "law"
"""Of MMLU-Pro, whose prompts are recorded."""

RESPONSES = (
    "",
    "   \n",
    "My answer is yes.",
    "Sure! Here it is:\n\nMy answer is no, I think.\n\nLet me know.",
    "* one\n* two\n* three",
    "- one\n  - two\n* three\n** four",
    "<<A title>>\nText, with a comma; 3 sentences. Dr. Smith said e.g. this. The end.",
    "<< >> <<>> not a title",
    '{"a": [1, 2]}',
    '```json\n{"a": 1}\n```',
    '"All of it is quoted."',
    '"Not all" of it',
    "Section 1\nfirst\nSection 2\nsecond\nSECTION 3 third",
    "One paragraph.\n***\nAnother one.\n***\nThe last.",
    "***\nAn empty one first.\n***\n\n***\nEnd",
    "First answer.\n******\nSecond answer.",
    "Same.******Same.******",
    'Weekend plans are here.\n\n"Hello," she said.\n\nThird one.',
    "Some *high* and **double lit** words, *  * and ****.",
    "Dear [name], meet me at [place] on [date].",
    "I agree.\n\nP.S. I was late.\nP.P.S. Twice.",
    "p. s. lower and p. p. s too",
    "THIS IS ALL IN CAPITALS, AND IT IS ENGLISH TEXT WITHOUT ANY DOUBT.",
    "this is all in small letters and it is english text without any doubt.",
    "Dies ist ein deutscher Satz, der keine Zweifel an seiner Sprache lässt.",
    "Voici une phrase française dont la langue ne fait aucun doute.",
    "12345 ... 678",
    "NASA and the U.S.A. CAN'T GO; it's WELL-KNOWN (AND/OR *BOLD*) that I'M HERE: YES--NO, 'QUOTED' CANNOT!",
    "Is it so? Yes! It is... so. Mr. Brown paid $3.50 at 5 p.m. He left.",
    "keyword Keyword KEYWORD keywords, and other words",
    "Write a poem. Here it is: roses",
    "That is all.  The end. ",
    'He said "that is the end."',
    "one two three four five six seven eight nine ten",
    "*First* part, *second* part, *third* part.",
)
"""What a model might answer; every check finds some right and some wrong."""


def ifeval_instructions() -> list[tuple[str, dict[str, Any]]]:
    """Every kind of instruction, with arguments of more than one kind."""
    less, least = "less than", "at least"
    return [
        ("keywords:existence", {"keywords": ["the", "end"]}),
        ("keywords:existence", {"keywords": ["keyword"]}),
        ("keywords:frequency", {"keyword": " keyword ", "frequency": 3, "relation": least}),
        ("keywords:frequency", {"keyword": "is", "frequency": 2, "relation": less}),
        ("keywords:forbidden_words", {"forbidden_words": ["is", "words"]}),
        ("keywords:letter_frequency", {"letter": "E", "let_frequency": 4, "let_relation": least}),
        ("keywords:letter_frequency", {"letter": "s", "let_frequency": 2, "let_relation": less}),
        ("language:response_language", {"language": "de"}),
        ("language:response_language", {"language": "fr"}),
        ("length_constraints:number_sentences", {"num_sentences": 3, "relation": least}),
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": less}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 3}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 1}),
        ("length_constraints:number_words", {"num_words": 10, "relation": least}),
        ("length_constraints:number_words", {"num_words": 5, "relation": less}),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "hello"},
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 3, "nth_paragraph": 1, "first_word": "Weekend"},
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 3}),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
        ("detectable_format:number_bullet_lists", {"num_bullets": 3}),
        ("detectable_format:constrained_response", {}),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 3}),
        ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}),
        ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 1}),
        ("detectable_format:json_format", {}),
        ("detectable_format:title", {}),
        ("combination:two_responses", {}),
        ("combination:repeat_prompt", {"prompt_to_repeat": "write a POEM."}),
        ("startend:end_checker", {"end_phrase": "The end."}),
        ("startend:quotation", {}),
        ("change_case:capital_word_frequency", {"capital_frequency": 12, "capital_relation": least}),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": less}),
        ("change_case:english_capital", {}),
        ("change_case:english_lowercase", {}),
        ("punctuation:no_comma", {}),
    ]


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
