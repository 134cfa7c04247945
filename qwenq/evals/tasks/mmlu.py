"""Ask MMLU: 57 subjects, four options, 14,042 questions (Hendrycks et al. 2021).

Sources of the protocols: ``evaluate_chat_mmlu.py`` and ``evaluate_mmlu.py`` of QwenLM/Qwen (card, base),
``tasks/mmlu/default`` of lm-evaluation-harness 0.4.13 (lm-eval). Differences from them:

- Options are text. The scripts read them with pandas, which turns an option such as ``None`` or ``N/A`` into
  ``nan`` in the prompt; here it stays what the file says.
- card: an option without text, or of full stops alone, is not searched for; the script inserts its letter
  between any two characters. An answer that is cut at the limit keeps its last token.
- base: a prompt that is too long for the model is an error of the run; the script drops its beginning.
- lm-eval: shows 5 examples, as ``--num_fewshot 5``; the harness shows none by default.
- lm-eval: no special token comes before a prompt, as with Qwen's tokenizers; the harness keeps those of
  others, such as Llama's.
"""

from __future__ import annotations

import re
from functools import partial

from qwenq.errors import DataError
from qwenq.evals.task import LETTERS, Item, Judgement, Task, Written, score_all
from qwenq.evals.tasks.choices import (
    judge_choice,
    judge_loglikelihood,
    judge_text,
    letter_item,
    lettered,
    options_by_length,
)
from qwenq.evals.tasks.data import Dataset, subjects_of
from qwenq.evals.tasks.files import Row, read_csv

CHAT_PROMPT = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as "
    "the answer to this question.\n\n{question}\n{options}\n"
)
HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
QUESTION = "{question}\n{options}\nAnswer:"

PATTERNS = tuple(
    map(
        re.compile,
        (
            # "the answer is C", "I choose C"; not "the answer is not C"
            r"(?:(?:[Cc]hoose)|(?:(?:[Aa]nswer|[Cc]hoice)(?![^ABCD]{0,20}?(?:n't|not))[^ABCD]{0,10}?"
            r"\b(?:|is|:|be))\b)[^ABCD]{0,20}?\b(A|B|C|D)\b",
            # "C is correct"; not "C is not correct"
            r"\b(A|B|C|D)\b(?![^ABCD]{0,8}?(?:n't|not)[^ABCD]{0,5}?(?:correct|right))[^ABCD]{0,10}?"
            r"\b(?:correct|right)\b",
            # the answer begins with its letter
            r"^(A|B|C|D)(?:\.|,|:|$)",
            # the first letter that stands alone
            r"(?<![a-zA-Z])(A|B|C|D)(?![a-zA-Z=])",
        ),
    )
)

COUNTS, CATEGORIES = subjects_of("mmlu")
"""As Qwen's scripts and the harness group them: anatomy is a science there, unlike in the data's own list."""


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter that was named, once options' texts are replaced by their letters."""
    text = answer.text.strip()
    for letter, option in options_by_length(item.data):
        if option.rstrip("."):
            text = re.sub(re.escape(option.rstrip(".")), letter, text, flags=re.IGNORECASE)
    return judge_text(item, text, PATTERNS)


def make(row: Row, subject: str | None) -> Item:
    """Return the item of a row of a file, or of the hub, where options are a list and answers numbers."""
    if subject is not None:
        return letter_item(row, subject)
    question, options, answer, subject = (
        row.data.get(key) for key in ("question", "choices", "answer", "subject")
    )
    texts = [question, *(options if isinstance(options, list) else ())]
    whole = len(texts) == 5 and all(isinstance(text, str) for text in texts)
    if not (whole and isinstance(answer, int) and answer in range(4)):
        raise DataError("a row needs a question, 4 choices, and an answer from 0 to 3", where=row.where)
    return Item("", subject, lettered(texts[0], texts[1:], LETTERS[answer], row.where))


MMLU = Dataset(
    name="mmlu",
    make=make,
    counts=COUNTS,
    hub="cais/mmlu",
    config="all",
    files=("{split}/{subject}_{split}.csv",),
    read=partial(read_csv, columns=("question", *LETTERS[:4], "answer"), header=False),
)
_task = partial(
    Task, name="mmlu", load=MMLU.load, subjects=COUNTS, average=partial(score_all, categories=CATEGORIES)
)
_letters = partial(_task, version=1, shots=5, allowed_shots=range(6), header=HEADER, choices=" {letter}")
PROTOCOLS: tuple[Task, ...] = (
    _task(protocol="card", version=2, question=CHAT_PROMPT, judge=judge_chat),
    _letters(
        protocol="base",
        shot=f"Question: {QUESTION} {{answer}}\n\n",
        question=f"Question: {QUESTION}",
        judge=judge_choice,
    ),
    _letters(
        protocol="lm-eval",
        shot=f"{QUESTION} {{answer}}\n\n",
        question=QUESTION,
        fill=lambda row: {**row, "question": row["question"].strip()},
        judge=judge_loglikelihood,
    ),
)
