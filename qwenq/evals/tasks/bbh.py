"""Ask BIG-Bench Hard: 27 tasks, 6,511 questions, each after 3 worked examples (Suzgun et al. 2022).

Examples and questions come from the authors' repository, suzgunmirac/BIG-Bench-Hard: ``bbh/{task}.json`` and
``cot-prompts/{task}.txt``, whose text every prompt begins with. Copies on the hub have no examples, so these
files are needed. The text behind "the answer is", less its full stop, has to equal the target exactly. The
score is the mean of the 27, as OpenCompass has it; the authors count three sizes of two tasks as one each.
Qwen's own script (3 examples) is not published; there is no protocol for chat models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qwenq.errors import DataError
from qwenq.evals.task import DataSource, Item, Judgement, Task, Written, score_all
from qwenq.evals.tasks.data import Dataset, local_folder, subjects_of
from qwenq.evals.tasks.files import AnyPath, Row, numbered, read_records, read_text, text_columns

ANSWER = re.compile(r"[Tt]he answer is (.*)")
RULE = re.compile(r"^-{3,}\s*$", re.MULTILINE)
"""Ends the note at the head of an examples file that asks to keep it out of training data."""
EXAMPLE = re.compile(r"^Q:", re.MULTILINE)
SHOTS = 3

COUNTS, _ = subjects_of("bbh")


def read(path: AnyPath) -> list[Row]:
    """Return the questions of a task's file, which is one object."""
    (whole,) = read_records(path)[:1]
    examples = whole.data.get("examples") if isinstance(whole.data, dict) else None
    return numbered(examples, str(path))


def make(row: Row, subject: str | None) -> Item:
    """Return the item of a row."""
    data = text_columns(row, ("input", "target"))
    return Item("", subject, {"input": data["input"], "answer": data["target"].strip()})


BBH = Dataset(
    name="bbh", make=make, counts=COUNTS, hub="", files=("bbh/{subject}.json", "{subject}.json"), read=read
)


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all questions, task by task; a subject is one of the 27, all of which have to be there."""
    if source.folder is None and not source.sample:
        raise DataError(
            "its worked examples are not on the hub: bbh needs the files of its authors",
            where="bbh",
            hint="copy the repository suzgunmirac/BIG-Bench-Hard into a folder bbh/ below --data DIR",
        )
    folder = local_folder(source, "bbh")
    assert folder is not None  # noqa: S101  (the hub was refused above)
    items = BBH.items(source, subjects or list(COUNTS))
    shown = {task: ({"examples": _examples(folder, task)},) for task in {item.subject for item in items}}
    return [replace(item, shots=shown[item.subject]) for item in items]


def _examples(folder: Path, task: str | None) -> str:
    """Return the worked examples of a task with the sentence before them."""
    path = folder / "cot-prompts" / f"{task}.txt"
    text = read_text(path).replace("\r\n", "\n")  # as it is checked out on Windows
    if rule := RULE.search(text):
        text = text[rule.end() :]
    if (found := len(EXAMPLE.findall(text))) != SHOTS:
        raise DataError(
            f"{found} worked examples where there should be {SHOTS}", where=path, hint="get the file again"
        )
    return text.strip()


def judge(item: Item, answer: Written) -> Judgement:
    """Judge the text behind the first "the answer is", to the end of its line."""
    match = ANSWER.search(answer.text)
    if match is None:
        return Judgement(False, None, note='no "the answer is"')
    found = match.group(1).strip().removesuffix(".")
    return Judgement(found == item.data["answer"], found)


PROTOCOLS: tuple[Task, ...] = (
    Task(
        name="bbh",
        protocol="base",
        version=1,
        shots=SHOTS,
        allowed_shots=(SHOTS,),
        load=load,
        shot="{examples}\n\n",
        question="Q: {input}\nA: Let's think step by step.\n",
        max_new_tokens=1024,
        until=("\n\n", "Q:"),
        judge=judge,
        average=partial(score_all, macro=True),
        subjects=COUNTS,
    ),
)
