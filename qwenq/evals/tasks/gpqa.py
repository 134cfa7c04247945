"""Ask GPQA-diamond: 198 questions of biology, chemistry and physics, four options (Rein et al. 2023).

Sources of the protocols:

- card: the sentence on the `answer` field that Qwen's model cards recommend for questions with options; the
  rest of that prompt is not published.
- base: the zero-shot prompt and the patterns of the authors' repository, idavidrein/gpqa, as plain text.
- lm-eval: ``gpqa_diamond_zeroshot`` of lm-evaluation-harness 0.4.13: letters by their probability.

The data holds the right answer in a separate column, so options have to be shuffled. Each item is shuffled
by a generator whose seed is a hash of ``SHUFFLE_SEED`` and its question: neither the order of the file nor
``--limit`` changes a question, and every model gets the same. The authors' script and the harness draw for
one item after the other from one generator, so their orders differ from this one.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from functools import partial

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import (
    Choose,
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
from qwenq.evals.tasks.choices import LETTERS, judge_loglikelihood
from qwenq.evals.tasks.data import Row, check_count, fetch_hub_file, local_folder, read_csv

VERSION = 1

SHUFFLE_SEED = 0
MAX_NEW_TOKENS = 2048
CHAT_PROMPT = (
    "{question}\n\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nPlease show your choice in the `answer` field with only "
    'the choice letter, e.g., `"answer": "C"`.'
)
OPTIONS = "Choices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n"
BASE_PROMPT = (
    "What is the correct answer to this question: {question}\n\n" + OPTIONS + "\n"
    'Format your response as follows: "The correct answer is (insert answer here)"'
)
LM_EVAL_PROMPT = "What is the correct answer to this question:{question}\n" + OPTIONS + "Answer:"
CONTINUATIONS = tuple(f" ({letter})" for letter in LETTERS)

FIELD = re.compile(r'"answer"\s*:\s*"?\(?([A-D])\b')
PATTERNS = tuple(
    map(
        re.compile,
        (r"answer is \((.)\)", r"Answer: \((.)\)", r"answer: \((.)\)", r"answer \((.)\)", r"\((.)\)"),
    )
)
"""Of the authors' script, in order; a match counts if it is one of the letters."""

RIGHT, WRONG = "Correct Answer", tuple(f"Incorrect Answer {n}" for n in (1, 2, 3))
DOMAIN = "High-level domain"
COLUMNS = ("Question", RIGHT, *WRONG, DOMAIN)
"""Of about 60; the others are facts on who wrote and tried the question."""
DOMAINS = ("Biology", "Chemistry", "Physics")
COUNT = 198
FILE = "gpqa_diamond.csv"
HUB = "Idavidrein/gpqa"
"""Gated. Its file is read as it is: ``datasets`` turns an answer such as ``None`` into nothing."""


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all questions in the order of the file; subjects are the three domains."""
    known = [domain.lower() for domain in DOMAINS]
    for subject in subjects:
        if subject not in known:
            raise UsageError(
                f"gpqa-diamond has no subject {subject!r}",
                where="--subjects",
                hint=f"it has {', '.join(known)}",
            )
    rows = _read(source)
    check_count(len(rows), COUNT, rows[0].where.rsplit(", ", 1)[0])
    items = [_item(n, row) for n, row in enumerate(rows)]
    return [item for item in items if not subjects or item.subject in subjects]


def ask_chat(item: Item) -> Request:
    """Return question, options and the sentence of Qwen's cards as the first message of a chat."""
    return Write(first_turn(CHAT_PROMPT.format_map(item.data)), MAX_NEW_TOKENS)


def ask_base(item: Item) -> Request:
    """Return the authors' zero-shot prompt as plain text."""
    return Write(BASE_PROMPT.format_map(item.data), MAX_NEW_TOKENS)


def ask_lm_eval(item: Item) -> Request:
    """Return the harness's prompt, whose options have been tidied, continued by `` (A)`` … `` (D)``."""
    tidied = {letter: tidy(item.data[letter]) for letter in LETTERS}
    return Choose(LM_EVAL_PROMPT.format_map({**item.data, **tidied}), CONTINUATIONS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter in the last ``answer`` field, else as the authors' script does."""
    fields = FIELD.findall(chat_text(answer))
    return _judged(item, fields[-1]) if fields else read_base(item, answer)


def read_base(item: Item, answer: Written) -> Judgement:
    """Judge the first letter in brackets that a pattern of the authors' script finds."""
    found = (match.group(1) for pattern in PATTERNS if (match := pattern.search(answer.text)))
    return _judged(item, next((letter for letter in found if letter in LETTERS), None))


def tidy(text: str) -> str:
    """Return an option as the harness shows it."""
    return text.strip().replace(" [title]", ". ").replace("  ", " ")


def shuffled(question: str, options: Sequence[str]) -> list[int]:
    """Return the order in which the options of a question are shown: indexes, the same in every run."""
    digest = hashlib.sha256(f"{SHUFFLE_SEED}\n{question}".encode()).digest()
    order = list(range(len(options)))
    random.Random(int.from_bytes(digest[:8])).shuffle(order)  # noqa: S311  (not a secret)
    return order


def _judged(item: Item, letter: str | None) -> Judgement:
    note = None if letter else "no letter in the answer"
    return Judgement(letter == item.data["answer"], letter, note=note)


def _item(number: int, row: Row) -> Item:
    question, domain = row.data["Question"], row.data[DOMAIN]
    options = [row.data[RIGHT], *(row.data[name] for name in WRONG)]
    if not question.strip() or not all(option.strip() for option in options):
        raise DataError("the question or one of its answers is empty", where=row.where)
    if domain not in DOMAINS:
        raise DataError(
            f"the domain is {domain!r}", where=row.where, hint=f"it has to be one of {', '.join(DOMAINS)}"
        )
    order = shuffled(question, options)
    data: Mapping[str, str] = {
        "question": question,
        **{letter: options[place] for letter, place in zip(LETTERS, order, strict=True)},
        "answer": LETTERS[order.index(0)],
    }
    return Item(f"{domain.lower()}/{number}", domain.lower(), data)


def _read(source: DataSource) -> list[Row]:
    folder = local_folder(source, "gpqa")
    path = fetch_hub_file(HUB, FILE, sampled=False) if folder is None else folder / FILE
    return read_csv(path, COLUMNS, header=True, optional=None)


_script = partial(
    Task,
    name="gpqa-diamond",
    version=VERSION,
    shots=0,
    allowed_shots=(0,),
    load=load,
    average=score_all,
    comment=partial(missing_subjects, "gpqa-diamond", [domain.lower() for domain in DOMAINS]),
)
PROTOCOLS: tuple[Task, ...] = (
    _script(protocol="card", ask=ask_chat, read=read_chat),
    _script(protocol="base", ask=ask_base, read=read_base),
    _script(protocol="lm-eval", ask=ask_lm_eval, read=judge_loglikelihood),
)
