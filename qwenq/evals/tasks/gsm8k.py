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
from decimal import Decimal, InvalidOperation
from functools import partial

from qwenq.errors import DataError
from qwenq.evals.task import DataSource, Item, Judgement, Request, Task, Write, Written, first_turn, score_all
from qwenq.evals.tasks.data import Row, check_count, copy_in, hub_rows, local_folder, read_json_lines

VERSION = 1

MAX_NEW_TOKENS = 512
QUESTION = "Question: {question}\nLet's think step by step"
SHOT = QUESTION + "\n{steps}\nThe answer is {number}\n\n"
BASE_STOPS = ("<|endoftext|>", "\n\n", "Question:")  # the script's fourth, three line ends, begins with two
LM_EVAL_QUESTION = "Question: {question}\nAnswer:"
LM_EVAL_SHOT = LM_EVAL_QUESTION + " {answer}\n\n"
LM_EVAL_STOPS = ("Question:", "</s>", "<|im_end|>")
LM_EVAL_MAX_NEW_TOKENS = 256
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
NUMBER = re.compile(
    r"([+-])?(?=([0-9]|\.[0-9]))(0|([1-9](\d{0,2}(,\d{3})*)|\d*))?(\.\d*)?(?=\D|$)",
)
TOLERANCE = 1e-4
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))

COLUMNS = ("question", "answer")
COUNTS = {"train": 7473, "test": 1319}


def load(
    examples: Sequence[str] | None, source: DataSource, subjects: Sequence[str], shots: int
) -> list[Item]:
    """Return the test split; there are no subjects.

    Args:
        examples: hashes of the train rows to show; None draws others for each item, as the harness does.
        source: of the files.
        subjects: ignored.
        shots: number of examples.
    """
    test = _read(source, "test")
    train = _read(source, "train") if shots else []
    if examples is None:
        drawn = random.Random(LM_EVAL_SEED)  # noqa: S311  (the harness's own generator, not a secret)
        shown = [tuple(row.data for row in drawn.sample(train, shots)) for _ in test]
    else:
        rows = train[:shots] if source.sample else _find(train, examples[:shots])
        for row in rows:
            _check_steps(row)
        shown = [tuple(row.data for row in rows)] * len(test)
    return [Item(f"test/{n}", None, row.data, shown[n]) for n, row in enumerate(test)]


def ask_chat(item: Item) -> Request:
    """Return the bare question as the first message of a chat, behind the examples, if any."""
    question = item.data["question"]
    if item.shots:
        question = _worked(item.shots) + QUESTION.format(question=question)
    return Write(first_turn(question), MAX_NEW_TOKENS)


def ask_base(item: Item) -> Request:
    """Return worked examples and question as plain text."""
    prompt = _worked(item.shots) + QUESTION.format(question=item.data["question"]) + "\n"
    return Write(prompt, MAX_NEW_TOKENS, BASE_STOPS)


def ask_lm_eval(item: Item) -> Request:
    """Return the harness's prompt; its examples keep their calculator notes."""
    shown = "".join(LM_EVAL_SHOT.format_map(row) for row in item.shots)
    return Write(shown + LM_EVAL_QUESTION.format_map(item.data), LM_EVAL_MAX_NEW_TOKENS, LM_EVAL_STOPS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Judge the last number, with thousands, decimals and sign: correct within 1e-4 of the right one."""
    found = last_number(answer.text)
    gold = last_number(item.data["answer"])
    value, expected = python_number(found), python_number(gold)
    correct = None not in (value, expected) and math.isclose(
        float(value or 0), float(expected or 0), rel_tol=0, abs_tol=TOLERANCE
    )
    return Judgement(correct, found, note=_note(found, value))


def read_base(item: Item, answer: Written) -> Judgement:
    """Judge the last run of digits: 234 of ``1,234`` and 50 of ``3.50``, as in the published score."""
    runs = DIGITS.findall(answer.text)
    found = runs[-1] if runs else None
    value = python_number(found)
    correct = value is not None and value == python_number(gold_number(item))
    return Judgement(correct, found, note=_note(found, value))


def read_lm_eval(item: Item, answer: Written) -> Judgement:
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


def gold_number(item: Item) -> str:
    """Return the number of the right answer, without thousands separators."""
    match = GOLD.search(item.data["answer"])
    assert match is not None  # noqa: S101  (every row was checked when it was read)
    return match.group(1).replace(",", "")


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


def _worked(rows: Sequence[Mapping[str, str]]) -> str:
    shown = ""
    for row in rows:
        steps, number = NOTE.sub("", row["answer"]).rsplit("\n#### ", 1)
        shown += SHOT.format(question=row["question"], steps=steps, number=number)
    return shown


def _find(train: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    by_hash = {hashlib.sha256(row.data["question"].encode()).hexdigest()[:16]: row for row in train}
    missing = [name for name in wanted if name not in by_hash]
    if missing:
        raise DataError(
            f"{len(missing)} of the examples that the published prompt shows are not in the train split",
            where=train[0].where.rsplit(", line", 1)[0],
            hint="get the original train.jsonl of grade-school-math",
        )
    return [by_hash[name] for name in wanted]


def _check_steps(row: Row) -> None:
    """Refuse an example whose answer is its number alone."""
    if "\n#### " not in row.data["answer"]:
        raise DataError(
            "an example has no steps before its number",
            where=row.where,
            hint="get the original train.jsonl of grade-school-math",
        )


def _read(source: DataSource, split: str) -> list[Row]:
    folder = local_folder(source, "gsm8k")
    file = None if folder is None else folder / f"{split}.jsonl"
    copy = None if file is None or file.exists() else copy_in(folder)
    if file is None or copy is not None:
        rows = hub_rows("openai/gsm8k", "main", split, COLUMNS, copy=copy)
    else:
        rows = read_json_lines(file, COLUMNS)
    if not source.sample:
        check_count(len(rows), COUNTS[split], rows[0].where.rsplit(", ", 1)[0])
    for row in rows:
        if not row.data["question"].strip():
            raise DataError("the question is empty", where=row.where)
        match = GOLD.search(row.data["answer"])
        if match is None or python_number(match.group(1).replace(",", "")) is None:
            raise DataError(
                "the answer does not end with its number", where=row.where, hint="its last line is `#### 42`"
            )
    return rows


_script = partial(Task, name="gsm8k", version=VERSION, average=score_all)
PROTOCOLS: tuple[Task, ...] = (
    _script(
        protocol="card",
        shots=0,
        allowed_shots=(0, 4),
        load=partial(load, CHAT_EXAMPLES),
        ask=ask_chat,
        read=read_chat,
    ),
    _script(
        protocol="base",
        shots=8,
        allowed_shots=range(9),
        load=partial(load, BASE_EXAMPLES),
        ask=ask_base,
        read=read_base,
    ),
    _script(
        protocol="lm-eval",
        shots=5,
        allowed_shots=range(26),
        load=partial(load, None),
        ask=ask_lm_eval,
        read=read_lm_eval,
    ),
)
