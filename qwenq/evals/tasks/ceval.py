"""Ask C-Eval: 52 Chinese subjects, four options, 1,346 questions of the val split (Huang et al. 2023).

Sources of the protocols: ``evaluate_chat_ceval.py`` and ``evaluate_ceval.py`` of QwenLM/Qwen. As there, the
val split is scored: the answers of the test split are not published.

Difference from the scripts, as in MMLU: options are text, and an empty option is not searched for.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from qwenq.evals.task import Item, Judgement, Task, Written, score_all
from qwenq.evals.tasks.choices import COLUMNS, judge_choice, judge_text, letter_item, options_by_length
from qwenq.evals.tasks.data import Dataset, subjects_of
from qwenq.evals.tasks.files import read_csv

QUESTION = "问题：{question}\n{options}\n答案："
CARD: dict[str, Any] = {"protocol": "card", "version": 2, "question": "{question}\n\n{options}\n"}
BASE: dict[str, Any] = {
    "protocol": "base",
    "version": 1,
    "shots": 5,
    "allowed_shots": range(6),
    "shot": QUESTION + "{answer}\n\n",  # no line about the subject before the first, unlike MMLU's
    "question": QUESTION,
    "choices": "{letter}",
    "judge": judge_choice,
}

PATTERNS = tuple(
    map(
        re.compile,
        (
            # 答案是C, 应该选C; not 答案不是C
            r"(?:(?:选|选择|选定)[：:]?\s*|(?:(?:答案|选项)(?![^ABCD]{0,10}?(?:不|非)[^ABCD]{0,10}?"
            r"(?:是|选|为|：|:|】))[^ABCD]{0,10}?(?:是|选|为|：|:|】))[^ABCD]{0,10}?)(A|B|C|D)(?:选项)?"
            r"(?:\)|。|\.|，|,|．|、|A|B|C|D|$|：|:|\)|）)",
            # C选项正确; not C不正确
            r"(A|B|C|D)(?:选?项)?(?![^ABCD]{0,4}?(?:不|非)[^ABCD]{0,4}?(?:正确|对[的，。：]|符合))"
            r"[^ABCD]{0,4}?(?:正确|对[的，。：]|符合)",
            # the answer begins with its letter
            r"^[\(（]?(A|B|C|D)(?:。|\)|）|\.|，|,|．|：|:|$)",
            # the first letter that stands alone
            r"(?<![a-zA-Z])(A|B|C|D)(?![a-zA-Z=])",
        ),
    )
)
LONG = 4  # a part of the question longer than this is removed from the answer

COUNTS, CATEGORIES = subjects_of("ceval")
IDENTIFIED = ("id", *COLUMNS)


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter that was named, or whose option completed the question's last sentence."""
    text = answer.text.strip()
    parts = item.data["question"].rstrip("。").split("。")[-1].split("_")
    if len(parts[0].strip()) > LONG:
        text = text.replace(parts[0], "答案是")
    if len(parts[-1].strip()) > LONG:
        text = text.replace(parts[-1], "")
    for letter, option in options_by_length(item.data):
        if option.rstrip("。"):
            text = text.replace(option.rstrip("。"), letter)
    return judge_text(item, text, PATTERNS)


CEVAL = Dataset(
    name="ceval",
    make=partial(letter_item, columns=IDENTIFIED),
    counts=COUNTS,
    hub="ceval/ceval-exam",
    config="{subject}",
    files=("{split}/{subject}_{split}.csv",),
    read=partial(read_csv, columns=IDENTIFIED, header=True),
    split="val",
)
_task = partial(
    Task,
    name="ceval",
    load=CEVAL.load,
    subjects=COUNTS,
    average=partial(score_all, macro=True, categories=CATEGORIES),
)
PROTOCOLS: tuple[Task, ...] = (_task(**CARD, judge=judge_chat), _task(**BASE))
