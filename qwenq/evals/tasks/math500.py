"""Ask MATH-500: 500 problems of MATH's test split (Lightman et al. 2023).

Sources of the protocols:

- card: the prompt ``qwen-boxed`` of QwenLM/Qwen2.5-Math; Qwen's later model cards have this sentence, too.
- base: MATH's prompt in Minerva's form, with 4 examples that were written for this project (``math.py``).
- lm-eval: the prompt of ``hendrycks_math500`` of lm-evaluation-harness 0.4.13: no examples.

Answers are compared as those of MATH, without algebra (``math.same_answer``); the harness compares text. All
problems count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
from qwenq.evals.tasks import math
from qwenq.evals.tasks.data import Row, check_count, copy_in, hub_rows, local_folder, read_json_lines

VERSION = 1

MAX_NEW_TOKENS = 2048
CHAT_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LM_EVAL_PROMPT = "Problem: {problem}\nAnswer:"
LM_EVAL_STOPS = ("Problem:",)
LM_EVAL_MAX_NEW_TOKENS = 1024  # our choice: the harness's default of 256 cuts most solutions

COUNTS = {
    "algebra": 124,
    "counting_and_probability": 38,
    "geometry": 41,
    "intermediate_algebra": 97,
    "number_theory": 62,
    "prealgebra": 82,
    "precalculus": 56,
}
"""Problems by subject: 500."""
COLUMNS = ("problem", "solution", "answer", "subject", "unique_id")
HUB = "HuggingFaceH4/MATH-500"


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return the problems in the order of the file."""
    unknown = [subject for subject in subjects if subject not in COUNTS]
    if unknown:
        raise UsageError(
            f"math-500 has no subject {unknown[0]!r}", where="--subjects", hint=f"it has {', '.join(COUNTS)}"
        )
    rows = _read(source)
    items = [_item(row, shots) for row in rows]
    for subject, count in COUNTS.items():
        found = sum(item.subject == subject for item in items)
        check_count(found, count, f"{rows[0].where.rsplit(', ', 1)[0]} ({subject})")
    return [item for item in items if not subjects or item.subject in subjects]


def ask_chat(item: Item) -> Request:
    """Return the problem and the sentence on the box as the first message of a chat."""
    return Write(first_turn(CHAT_PROMPT.format_map(item.data)), MAX_NEW_TOKENS)


def ask_lm_eval(item: Item) -> Request:
    """Return the harness's prompt."""
    return Write(LM_EVAL_PROMPT.format_map(item.data), LM_EVAL_MAX_NEW_TOKENS, LM_EVAL_STOPS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Judge the last box, else the stated final answer."""
    text = chat_text(answer)
    return _judged(item, math.boxed(text) or math.stated(text))


def read_lm_eval(item: Item, answer: Written) -> Judgement:
    """Judge the text between the first and the last dollar sign, else the whole answer."""
    first, last = answer.text.find("$"), answer.text.rfind("$")
    found = answer.text[first + 1 : last] if last > first else answer.text
    return _judged(item, found.strip() or None)


def _judged(item: Item, found: str | None) -> Judgement:
    if found is None:
        return Judgement(False, None, note="no final answer")
    return Judgement(math.same_answer(found, item.data["answer"]), found)


def _item(row: Row, shots: int) -> Item:
    subject = row.data["subject"].lower().replace("&", "and").replace(" ", "_")
    if subject not in COUNTS:
        raise DataError(f"no subject of MATH is called {row.data['subject']!r}", where=row.where)
    if not row.data["problem"].strip() or not row.data["answer"].strip():
        raise DataError("the problem or its answer is empty", where=row.where)
    name = row.data["unique_id"].removeprefix("test/").removesuffix(".json")
    return Item(name, subject, row.data, math.EXAMPLES[:shots])


def _read(source: DataSource) -> list[Row]:
    folder = local_folder(source, "math-500")
    file = None if folder is None else folder / "test.jsonl"
    copy = None if file is None or file.exists() else copy_in(folder)
    if file is None or copy is not None:
        return hub_rows(HUB, None, "test", COLUMNS, sampled=False, copy=copy)
    return read_json_lines(file, COLUMNS)


_script = partial(
    Task,
    name="math-500",
    version=VERSION,
    load=load,
    average=score_all,
    comment=partial(missing_subjects, "math-500", COUNTS),
)
PROTOCOLS: tuple[Task, ...] = (
    _script(protocol="card", shots=0, allowed_shots=(0,), ask=ask_chat, read=read_chat),
    _script(protocol="base", shots=4, allowed_shots=range(5), ask=math.ask, read=math.read),
    _script(protocol="lm-eval", shots=0, allowed_shots=(0,), ask=ask_lm_eval, read=read_lm_eval),
)
