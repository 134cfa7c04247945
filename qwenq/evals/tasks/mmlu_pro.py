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

import re
from collections.abc import Mapping
from functools import partial

from qwenq.errors import DataError
from qwenq.evals.task import Item, Judgement, Task, Written, letters_of
from qwenq.evals.tasks.choices import judge_found, lettered
from qwenq.evals.tasks.data import Dataset, subjects_of
from qwenq.evals.tasks.files import Row, text_columns

CHAT_PROMPT = (
    "{question}\n\n{options}\n\nPlease show your choice in the `answer` field with only the choice letter, "
    'e.g., `"answer": "C"`.'
)
HEADER = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then "
    'finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
)
QUESTION = "Question:\n{question}\nOptions:\n{options}\n"
CUE = "Answer: Let's think step by step."
STEPS = "A: Let's think step by step."
"""Beginning of the worked answers in the data, replaced by ``CUE`` in prompts."""

FIELD = re.compile(r'"answer"\s*:\s*"?\(?([A-J])\b')
STATED = re.compile(r"answer is \(?([A-J])\)?")
PATTERNS = (
    STATED,
    re.compile(r".*[aA]nswer:\s*([A-J])"),
    re.compile(r"\b([A-J])\b(?!.*\b[A-J]\b)", re.DOTALL),  # the last letter that stands alone
)

COUNTS, _ = subjects_of("mmlu-pro")
ABSENT = "N/A"
"""Text of an option that does not exist, which the authors' script skips."""


def make(row: Row, _: str | None) -> Item:
    """Return the item of a row: columns of text, and each option under its letter."""
    data = text_columns(row, ("question", "answer", "cot_content", "category"))
    options = row.data.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise DataError("the options have to be a list of texts", where=row.where)
    there = [option for option in options if option != ABSENT]
    subject = data.pop("category").replace(" ", "_")
    return Item("", subject, data | lettered(data["question"], there, data["answer"], row.where))


def fill_base(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row whose worked answer begins as the authors' prompt has it."""
    return {**row, "steps": row["cot_content"].replace(STEPS, CUE)}


def fill_lm_eval(row: Mapping[str, str]) -> dict[str, str]:
    """Return a row as the harness shows it, options without white space around them."""
    options = {letter: row[letter].strip() for letter in letters_of(row)}
    return {**row, **options, "steps": f"{CUE} {row['cot_content'].replace(f'{STEPS} ', '')}"}


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter in the last ``answer`` field, else as the authors' script does."""
    fields = FIELD.findall(answer.text.strip())
    return judge_found(item, fields[-1]) if fields else judge_base(item, answer)


def judge_base(item: Item, answer: Written) -> Judgement:
    """Judge the letter that the first matching pattern of the authors' script finds."""
    matches = (pattern.search(answer.text) for pattern in PATTERNS)
    return judge_found(item, next((match.group(1) for match in matches if match), None))


def judge_lm_eval(item: Item, answer: Written) -> Judgement:
    """Judge the letter behind the first "answer is"."""
    match = STATED.search(answer.text)
    return judge_found(item, match.group(1) if match else None)


MMLU_PRO = Dataset(name="mmlu-pro", make=make, counts=COUNTS, hub="TIGER-Lab/MMLU-Pro", examples="validation")
_task = partial(Task, name="mmlu-pro", version=1, load=MMLU_PRO.load, subjects=COUNTS, max_new_tokens=2048)
_worked = partial(
    _task,
    shots=5,
    allowed_shots=range(6),
    shot=QUESTION + "{steps}\n\n",
    question=QUESTION + CUE,
    until=("Question:",),
)
PROTOCOLS: tuple[Task, ...] = (
    _task(protocol="card", question=CHAT_PROMPT, judge=judge_chat),
    _worked(protocol="base", header=HEADER + "\n\n\n", fill=fill_base, judge=judge_base),
    _worked(protocol="lm-eval", header=HEADER, fill=fill_lm_eval, judge=judge_lm_eval),
)
