"""Ask MMLU-Pro: 14 subjects, up to ten options, 12,032 questions (Wang et al. 2024).

Sources of the protocols:

- card: the sentence on the `answer` field that Qwen's model cards recommend for questions with options; the
  rest of that prompt is not published.
- base: ``evaluate_from_local.py`` and ``initial_prompt.txt`` of TIGER-AI-Lab/MMLU-Pro, 5 worked examples.
- lm-eval: ``tasks/mmlu_pro`` of lm-evaluation-harness 0.4.13.

The authors' script draws a letter at random where it finds none, and shows fewer examples where a prompt is
too long for 4,096 tokens; here an answer without a letter is wrong, and a prompt that is too long for the
model is an error of the run. All questions count alike, as in the authors' total.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import (
    DataSource,
    Item,
    Judgement,
    Request,
    Task,
    Write,
    Written,
    chat_text,
    first_turn,
    missing_subjects,
    score_all,
)
from qwenq.evals.tasks.data import (
    check_count,
    copy_in,
    local_folder,
    numbered,
    place_of,
    read_hub,
    read_json_records,
    text_columns,
)

VERSION = 1

LETTERS = tuple(ascii_uppercase[:10])
MAX_NEW_TOKENS = 2048
CHAT_PROMPT = (
    "{question}\n\n{options}\n\nPlease show your choice in the `answer` field with only the choice letter, "
    'e.g., `"answer": "C"`.'
)
TASK = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then "
    'finish your answer with "the answer is (X)" where X is the correct letter choice.'
)
HEADER = TASK + "\n\n\n\n"
LM_EVAL_HEADER = TASK + "\n"
QUESTION = "Question:\n{question}\nOptions:\n{options}\n"
CUE = "Answer: Let's think step by step."
STEPS = "A: Let's think step by step."
"""Beginning of the worked answers in the data, replaced by ``CUE`` in prompts."""
STOPS = ("Question:",)

FIELD = re.compile(r'"answer"\s*:\s*"?\(?([A-J])\b')
STATED = re.compile(r"answer is \(?([A-J])\)?")
PATTERNS = (
    STATED,
    re.compile(r".*[aA]nswer:\s*([A-J])"),
    re.compile(r"\b([A-J])\b(?!.*\b[A-J]\b)", re.DOTALL),  # the last letter that stands alone
)

COUNTS = {
    "biology": 717,
    "business": 789,
    "chemistry": 1132,
    "computer_science": 410,
    "economics": 844,
    "engineering": 969,
    "health": 818,
    "history": 381,
    "law": 1101,
    "math": 1351,
    "other": 924,
    "philosophy": 499,
    "physics": 1299,
    "psychology": 798,
}
"""Questions by subject in the test split: 12,032."""
COLUMNS = ("question", "answer", "cot_content", "category")
HUB = "TIGER-Lab/MMLU-Pro"
ABSENT = "N/A"
"""Text of an option that does not exist, which the authors' script skips."""


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return the test split, subject by subject, with examples from the validation split."""
    for subject in subjects:
        if subject not in COUNTS:
            close = difflib.get_close_matches(subject, COUNTS, n=3) or list(COUNTS)[:3]
            raise UsageError(
                f"mmlu-pro has no subject {subject!r}", where="--subjects", hint=f"such as {', '.join(close)}"
            )
    wanted = [subject for subject in COUNTS if not subjects or subject in subjects]
    scored = _read(source, "test")
    examples = _read(source, "validation") if shots else {}
    items = []
    for subject in wanted:
        rows = scored.get(subject, [])
        check_count(len(rows), COUNTS[subject], f"{_where(source)}, test, {subject}")
        shown = examples.get(subject, [])
        if len(shown) < shots:
            raise DataError(
                f"{len(shown)} examples where {shots} are to be shown",
                where=f"{_where(source)}, validation, {subject}",
                hint="get the validation file again, or show fewer with --shots",
            )
        items += [Item(f"{subject}/{n}", subject, row, tuple(shown[:shots])) for n, row in enumerate(rows)]
    return items


def ask_chat(item: Item) -> Request:
    """Return question, options and the sentence of Qwen's cards as the first message of a chat."""
    prompt = CHAT_PROMPT.format(question=item.data["question"], options=_listed(item.data))
    return Write(first_turn(prompt), MAX_NEW_TOKENS)


def ask_base(item: Item) -> Request:
    """Return the authors' prompt: worked examples and the question, to be answered step by step."""
    shown = "".join(f"{_question(row)}{row['cot_content'].replace(STEPS, CUE)}\n\n" for row in item.shots)
    return Write(_header(HEADER, item) + shown + _question(item.data) + CUE, MAX_NEW_TOKENS, STOPS)


def ask_lm_eval(item: Item) -> Request:
    """Return the harness's prompt: another header, and options without white space around them."""
    shown = "".join(
        f"{_question(row, strip=True)}{CUE} {row['cot_content'].replace(f'{STEPS} ', '')}\n\n"
        for row in item.shots
    )
    prompt = _header(LM_EVAL_HEADER, item) + shown + _question(item.data, strip=True) + CUE
    return Write(prompt, MAX_NEW_TOKENS, STOPS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter in the last ``answer`` field, else as the authors' script does."""
    text = chat_text(answer)
    fields = FIELD.findall(text)
    return _judged(item, fields[-1]) if fields else read_base(item, answer)


def read_base(item: Item, answer: Written) -> Judgement:
    """Judge the letter that the first matching pattern of the authors' script finds."""
    matches = (pattern.search(answer.text) for pattern in PATTERNS)
    return _judged(item, next((match.group(1) for match in matches if match), None))


def read_lm_eval(item: Item, answer: Written) -> Judgement:
    """Judge the letter behind the first "answer is"."""
    match = STATED.search(answer.text)
    return _judged(item, match.group(1) if match else None)


def _judged(item: Item, letter: str | None) -> Judgement:
    note = None if letter else "no letter in the answer"
    return Judgement(letter == item.data["answer"], letter, note=note)


def _header(header: str, item: Item) -> str:
    return header.format(subject=(item.subject or "").replace("_", " "))


def _question(row: Mapping[str, str], *, strip: bool = False) -> str:
    return QUESTION.format(question=row["question"], options=_listed(row, strip=strip))


def _listed(row: Mapping[str, str], *, strip: bool = False) -> str:
    options = ((letter, row[letter].strip() if strip else row[letter]) for letter in LETTERS if letter in row)
    return "\n".join(f"{letter}. {text}" for letter, text in options)


def _where(source: DataSource) -> str:
    return str(source.folder / "mmlu-pro") if source.folder is not None else f"hub dataset {HUB}"


def _read(source: DataSource, split: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of a split by subject: columns of text, and each option under its letter."""
    folder = local_folder(source, "mmlu-pro")
    file: Path | None = None if folder is None else folder / f"{split}.jsonl"
    copy = None if file is None or file.exists() else copy_in(folder)
    if file is None or copy is not None:
        records = numbered(read_hub(HUB, None, split, sampled=False, copy=copy), place_of(HUB, split, copy))
    else:
        records = read_json_records(file)
    found: dict[str, list[dict[str, str]]] = {}
    for record, where in records:
        row = _row(record, where)
        found.setdefault(row.pop("category").replace(" ", "_"), []).append(row)
    return found


def _row(record: Any, where: str) -> dict[str, str]:
    row = text_columns(record, COLUMNS, where)
    listed = record.get("options")
    if not isinstance(listed, list) or not all(isinstance(option, str) for option in listed):
        raise DataError("the options have to be a list of texts", where=where)
    options = [option for option in listed if option != ABSENT]
    if not row["question"].strip():
        raise DataError("the question is empty", where=where)
    if len(options) > len(LETTERS) or row["answer"] not in LETTERS[: len(options)]:
        raise DataError(
            f"the answer is {row['answer']!r} of {len(options)} options",
            where=where,
            hint="it has to be the letter of one of at most ten options",
        )
    return {**row, **dict(zip(LETTERS, options, strict=False))}


_script = partial(
    Task,
    name="mmlu-pro",
    version=VERSION,
    load=load,
    average=score_all,
    comment=partial(missing_subjects, "mmlu-pro", COUNTS),
)
PROTOCOLS: tuple[Task, ...] = (
    _script(protocol="card", shots=0, allowed_shots=(0,), ask=ask_chat, read=read_chat),
    _script(protocol="base", shots=5, allowed_shots=range(6), ask=ask_base, read=read_base),
    _script(protocol="lm-eval", shots=5, allowed_shots=range(6), ask=ask_lm_eval, read=read_lm_eval),
)
