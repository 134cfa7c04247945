"""Ask BIG-Bench Hard: 27 tasks, 6,511 questions, each after 3 worked examples (Suzgun et al. 2022).

Examples and questions come from the authors' repository, suzgunmirac/BIG-Bench-Hard: ``bbh/{task}.json`` and
``cot-prompts/{task}.txt``, whose text every prompt begins with. Copies on the hub have no examples, so these
files are needed. The text behind "the answer is", less its full stop, has to equal the target exactly. The
score is the mean of the 27, as OpenCompass has it; the authors count three sizes of two tasks as one each.
Qwen's own script (3 examples) is not published; there is no protocol for chat models.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import (
    DataSource,
    Item,
    Judgement,
    Request,
    Task,
    Write,
    Written,
    missing_subjects,
    score_all,
)
from qwenq.evals.tasks.data import check_count, local_folder, numbered, read_json, read_text, text_columns

VERSION = 1

MAX_NEW_TOKENS = 1024
QUESTION = "{examples}\n\nQ: {input}\nA: Let's think step by step.\n"
STOPS = ("\n\n", "Q:")
ANSWER = re.compile(r"[Tt]he answer is (.*)")
RULE = re.compile(r"^-{3,}\s*$", re.MULTILINE)
"""Ends the note at the head of an examples file that asks to keep it out of training data."""
EXAMPLE = re.compile(r"^Q:", re.MULTILINE)
SHOTS = 3

SMALLER = {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}
TASKS = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa"),
    *("dyck_languages", "formal_fallacies", "geometric_shapes", "hyperbaton"),
    *("logical_deduction_five_objects", "logical_deduction_seven_objects", "logical_deduction_three_objects"),
    *("movie_recommendation", "multistep_arithmetic_two", "navigate", "object_counting"),
    *("penguins_in_a_table", "reasoning_about_colored_objects", "ruin_names"),
    *("salient_translation_error_detection", "snarks", "sports_understanding", "temporal_sequences"),
    *("tracking_shuffled_objects_five_objects", "tracking_shuffled_objects_seven_objects"),
    *("tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting"),
)
COUNTS = {task: SMALLER.get(task, 250) for task in TASKS}
"""Questions by task: 6,511."""


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all questions, task by task; a subject is one of the 27."""
    for subject in subjects:
        if subject not in COUNTS:
            close = difflib.get_close_matches(subject, TASKS, n=3) or TASKS[:3]
            raise UsageError(
                f"bbh has no subject {subject!r}", where="--subjects", hint=f"such as {', '.join(close)}"
            )
    if source.folder is None and not source.sample:
        raise DataError(
            "its worked examples are not on the hub: bbh needs the files of its authors",
            where="bbh",
            hint="copy the repository suzgunmirac/BIG-Bench-Hard into a folder bbh/ below --data DIR",
        )
    folder = local_folder(source, "bbh")
    assert folder is not None  # noqa: S101  (the hub was refused above)
    root = folder if not (folder / "bbh").is_dir() else folder / "bbh"
    wanted = [task for task in TASKS if not subjects or task in subjects]
    return [item for task in wanted for item in _items(root, folder / "cot-prompts", task)]


def ask(item: Item) -> Request:
    """Return examples and question as plain text."""
    return Write(QUESTION.format(examples=item.shots[0]["examples"], **item.data), MAX_NEW_TOKENS, STOPS)


def read(item: Item, answer: Written) -> Judgement:
    """Judge the text behind the first "the answer is", to the end of its line."""
    match = ANSWER.search(answer.text)
    if match is None:
        return Judgement(False, None, note='no "the answer is"')
    found = match.group(1).strip().removesuffix(".")
    return Judgement(found == item.data["answer"], found)


def _items(root: Path, prompts: Path, task: str) -> list[Item]:
    path = root / f"{task}.json"
    content = read_json(path)
    records = numbered(content.get("examples") if isinstance(content, dict) else None, str(path))
    check_count(len(records), COUNTS[task], path)
    shown = ({"examples": _examples(prompts / f"{task}.txt")},)
    rows = [text_columns(record, ("input", "target"), where) for record, where in records]
    data = [{"input": row["input"], "answer": row["target"].strip()} for row in rows]
    return [Item(f"{task}/{n}", task, row, shown) for n, row in enumerate(data)]


def _examples(path: Path) -> str:
    """Return the worked examples of a task with the sentence before them."""
    text = read_text(path).replace("\r\n", "\n")  # as it is checked out on Windows
    if rule := RULE.search(text):
        text = text[rule.end() :]
    if (found := len(EXAMPLE.findall(text))) != SHOTS:
        raise DataError(
            f"{found} worked examples where there should be {SHOTS}", where=path, hint="get the file again"
        )
    return text.strip()


PROTOCOLS: tuple[Task, ...] = (
    Task(
        name="bbh",
        protocol="base",
        version=VERSION,
        shots=SHOTS,
        allowed_shots=(SHOTS,),
        load=load,
        ask=ask,
        read=read,
        average=partial(score_all, macro=True),
        comment=partial(missing_subjects, "bbh", TASKS),
    ),
)
