"""Ask GSM8K: 1,319 word problems whose answer is a number (Cobbe et al. 2021).

Sources of the protocols: ``evaluate_chat_gsm8k.py`` and ``evaluate_gsm8k.py`` of QwenLM/Qwen (card, base),
``tasks/gsm8k`` of lm-evaluation-harness 0.4.13 (lm-eval).

The examples of the card and base prompts are rows of the train split: they are looked up there, and formatted
with the solution's ``<<…>>`` calculator notes left out, which gives the published prompt to the byte.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from functools import partial

from qwenq.errors import DataError
from qwenq.evals.task import DataSource, Item, Judgement, Task, Written
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row, require_text, text_columns

QUESTION = "Question: {question}\nLet's think step by step"
SHOT = QUESTION + "\n{steps}\nThe answer is {number}\n\n"
LM_EVAL_QUESTION = "Question: {question}\nAnswer:"
LM_EVAL_SEED = 1234

BASE_EXAMPLES = (  # cookout, rent, pizza, raise, treats, used cars, laundry, orchard
    *("d97272d2652ff205", "d9655201db60eabf", "9ecbe4ab23b0051f", "9e72bae569796cdf"),
    *("17ce48ef200c6aff", "0326094058f9ca38", "dbd9ea0def142666", "22f45bbd4a6f44e7"),
)
CHAT_EXAMPLES = (  # study plan, basketball, marbles, fruit baskets
    *("40c1a60c6ce4f679", "be2aceb8a7f5f0ac", "e8d5da7770dac5e8", "b6468982b0e9dcb0"),
)
"""The examples: rows of the train split by the first 16 digits of their question's sha256."""

GOLD = re.compile(r"#### (\-?[0-9\.\,]+)$")
NOTE = re.compile(r"<<.*?>>")
DIGITS = re.compile(r"\d+")
NUMBER = re.compile(r"([+-])?(?=([0-9]|\.[0-9]))(0|([1-9](\d{0,2}(,\d{3})*)|\d*))?(\.\d*)?(?=\D|$)")
TOLERANCE = 1e-4
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))


def make(row: Row, _: str | None) -> Item:
    """Return the item of a row, whose solution has to end with its number."""
    data = text_columns(row, ("question", "answer"))
    require_text(data["question"], "question", row.where)
    match = GOLD.search(data["answer"])
    if match is None or python_number(match.group(1).replace(",", "")) is None:
        raise DataError(
            "the answer does not end with its number", where=row.where, hint="its last line is `#### 42`"
        )
    return Item("", None, data)


TEST = Dataset(name="gsm8k", make=make, counts={None: 1319}, hub="openai/gsm8k", config="main")
TRAIN = replace(TEST, split="train", counts={None: 7473})


def load(
    examples: Sequence[str] | None, source: DataSource, subjects: Sequence[str], shots: int
) -> list[Item]:
    """Return the test split, which has no subjects; each item with its examples from the train split.

    ``examples`` are hashes of the rows to show; None draws others for each item, as the harness does.
    """
    test = TEST.items(source)
    if not shots:
        return test
    train = [item.data for item in TRAIN.items(source)]
    if examples is None:
        drawn = random.Random(LM_EVAL_SEED)  # noqa: S311  (the harness's own generator, not a secret)
        return [replace(item, shots=tuple(drawn.sample(train, shots))) for item in test]
    by_hash = {hashlib.sha256(row["question"].encode()).hexdigest()[:16]: row for row in train}
    shown = (
        train[:shots] if source.sample else [by_hash[name] for name in examples[:shots] if name in by_hash]
    )
    what = ""
    if missing := shots - len(shown):
        what = f"{missing} of the examples that the published prompt shows are not in the train split"
    elif any("\n#### " not in row["answer"] for row in shown):
        what = "an example has no steps before its number"
    if what:
        where = source.folder / "gsm8k" / "train.jsonl" if source.folder else f"hub dataset {TRAIN.hub}"
        raise DataError(what, where=where, hint="get the original train.jsonl of grade-school-math")
    return [replace(item, shots=tuple(shown)) for item in test]


def fill(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row with its steps, without calculator notes, and its number."""
    steps, _, number = NOTE.sub("", row["answer"]).rpartition("\n#### ")
    return {**row, "steps": steps, "number": number}


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Judge the last number, with thousands, decimals and sign: correct within 1e-4 of the right one."""
    found = last_number(answer.text)
    gold = last_number(item.data["answer"])
    value, expected = python_number(found), python_number(gold)
    correct = None not in (value, expected) and math.isclose(
        float(value or 0), float(expected or 0), rel_tol=0, abs_tol=TOLERANCE
    )
    return Judgement(correct, found, note=_note(found, value))


def judge_base(item: Item, answer: Written) -> Judgement:
    """Judge the last run of digits: 234 of ``1,234`` and 50 of ``3.50``, as in the published score."""
    runs = DIGITS.findall(answer.text)
    found = runs[-1] if runs else None
    value, gold = python_number(found), GOLD.search(item.data["answer"])
    assert gold is not None  # noqa: S101  (every row was checked when it was read)
    correct = value is not None and value == python_number(gold.group(1).replace(",", ""))
    return Judgement(correct, found, note=_note(found, value))


def judge_lm_eval(item: Item, answer: Written) -> Judgement:
    """Judge as text the first number behind ``####`` (strict) and the last number (flexible)."""
    gold = _bare(item.data["answer"])
    strict = STRICT.findall(answer.text)
    flexible = [next(filter(None, groups)) for groups in FLEXIBLE.findall(answer.text)]
    found = strict[0] if strict else None
    return Judgement(
        correct=found is not None and _bare(found) == gold,
        extracted=found,
        also={"flexible": bool(flexible) and _bare(flexible[-1]) == gold},
        note=None if strict else "no number behind ####",
    )


def last_number(text: str) -> str | None:
    """Return the last number of a text without separators and plus sign: ``1234.50`` of ``$1,234.50``."""
    matches = [match.group() for match in NUMBER.finditer(text)]
    return matches[-1].replace(",", "").replace("+", "") if matches else None


def python_number(text: str | None) -> Decimal | None:
    """Return the value of a number in Python's notation; None for None and for errors such as ``007``."""
    if text is None or not text.isascii():
        return None
    whole = text.lstrip("-").partition(".")[0]
    if "." not in text and whole.startswith("0") and whole.strip("0"):
        return None
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _note(found: str | None, value: Decimal | None) -> str | None:
    if found is None:
        return "no number in the answer"
    return "not a number in Python, hence wrong in the published score" if value is None else None


def _bare(text: str) -> str:
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


_task = partial(Task, name="gsm8k", version=1)
PROTOCOLS: tuple[Task, ...] = (
    _task(
        protocol="card",
        allowed_shots=(0, 4),
        load=partial(load, CHAT_EXAMPLES),
        shot=SHOT,
        question=QUESTION,
        alone="{question}",
        fill=fill,
        judge=judge_chat,
    ),
    _task(
        protocol="base",
        shots=8,
        allowed_shots=range(9),
        load=partial(load, BASE_EXAMPLES),
        shot=SHOT,
        question=QUESTION + "\n",
        fill=fill,
        until=("<|endoftext|>", "\n\n", "Question:"),  # the script's fourth begins with the second
        judge=judge_base,
    ),
    _task(
        protocol="lm-eval",
        shots=5,
        allowed_shots=range(26),
        load=partial(load, None),
        shot=LM_EVAL_QUESTION + " {answer}\n\n",
        question=LM_EVAL_QUESTION,
        max_new_tokens=256,
        until=("Question:", "</s>", "<|im_end|>"),
        judge=judge_lm_eval,
    ),
)
