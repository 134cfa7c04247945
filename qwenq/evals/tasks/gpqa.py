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

from qwenq.errors import DataError
from qwenq.evals.task import LETTERS, Item, Judgement, Task, Written, letters_of
from qwenq.evals.tasks.choices import judge_found, judge_loglikelihood, lettered
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row, read_csv, require_text
from qwenq.evals.tasks.mmlu_pro import CHAT_PROMPT, FIELD

SHUFFLE_SEED = 0
OPTIONS = "Choices:\n{options}\n"
BASE_PROMPT = (
    "What is the correct answer to this question: {question}\n\n" + OPTIONS + "\n"
    'Format your response as follows: "The correct answer is (insert answer here)"'
)
LM_EVAL_PROMPT = "What is the correct answer to this question:{question}\n" + OPTIONS + "Answer:"
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
DOMAINS = ("biology", "chemistry", "physics")


def make(row: Row, _: str | None) -> Item:
    """Return the item of a row, its options shuffled."""
    question, domain = row.data["Question"], row.data[DOMAIN].lower()
    options = [row.data[RIGHT], *(row.data[name] for name in WRONG)]
    for text in (question, *options):
        require_text(text, "question or one of its answers", row.where)
    if domain not in DOMAINS:
        raise DataError(
            f"the domain is {domain!r}", where=row.where, hint=f"it has to be one of {', '.join(DOMAINS)}"
        )
    order = shuffled(question, options)
    right = LETTERS[order.index(0)]
    return Item("", domain, lettered(question, [options[place] for place in order], right, row.where))


def fill_lm_eval(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row whose options have been tidied as the harness shows them."""
    options = {
        name: row[name].strip().replace(" [title]", ". ").replace("  ", " ") for name in letters_of(row)
    }
    return {**row, **options}


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter in the last ``answer`` field, else as the authors' script does."""
    fields = [letter for letter in FIELD.findall(answer.text.strip()) if letter in LETTERS[:4]]
    return judge_found(item, fields[-1]) if fields else judge_base(item, answer)


def judge_base(item: Item, answer: Written) -> Judgement:
    """Judge the first letter in brackets that a pattern of the authors' script finds."""
    found = (match.group(1) for pattern in PATTERNS if (match := pattern.search(answer.text)))
    return judge_found(item, next((letter for letter in found if letter in LETTERS[:4]), None))


def shuffled(question: str, options: Sequence[str]) -> list[int]:
    """Return the order in which the options of a question are shown: indexes, the same in every run."""
    digest = hashlib.sha256(f"{SHUFFLE_SEED}\n{question}".encode()).digest()
    order = list(range(len(options)))
    random.Random(int.from_bytes(digest[:8])).shuffle(order)  # noqa: S311  (not a secret)
    return order


GPQA = Dataset(
    name="gpqa-diamond",
    folder="gpqa",
    make=make,
    counts=dict.fromkeys(DOMAINS),
    total=198,
    numbered_as_a_whole=True,
    hub="Idavidrein/gpqa",  # gated; its file is read: ``datasets`` turns an answer ``None`` into nothing
    hub_file="gpqa_diamond.csv",
    files=("gpqa_diamond.csv",),
    read=partial(read_csv, columns=COLUMNS, header=True),
)
_task = partial(Task, name="gpqa-diamond", version=1, load=GPQA.load, subjects=DOMAINS, max_new_tokens=2048)
PROTOCOLS: tuple[Task, ...] = (
    _task(protocol="card", question=CHAT_PROMPT, judge=judge_chat),
    _task(protocol="base", question=BASE_PROMPT, option="({letter}) {text}", judge=judge_base),
    _task(
        protocol="lm-eval",
        question=LM_EVAL_PROMPT,
        option="({letter}) {text}",
        fill=fill_lm_eval,
        choices=" ({letter})",
        judge=judge_loglikelihood,
    ),
)
