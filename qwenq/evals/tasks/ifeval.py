"""Ask IFEval: 541 prompts with 834 instructions that a program can check (Zhou et al. 2023).

The prompt is the whole question: no system message, no examples. ``card`` asks it in a chat, ``lm-eval`` as
plain text, as ``tasks/ifeval`` of lm-evaluation-harness 0.4.13 does without a chat template; both have the
harness's limit of tokens. The checks are in ``ifeval_checks.py``.

The authors publish four figures, and so does this task: prompts of which every instruction was followed (the
main score) and instructions that were followed, both strictly and loosely. Instructions of one prompt are not
independent, so the interval of their share is a little too narrow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qwenq.errors import DataError
from qwenq.evals.task import MAIN, DataSource, Item, Judged, Judgement, Score, Task, Written
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row, require_text, text_columns
from qwenq.evals.tasks.ifeval_checks import CHECKS, follows, follows_loosely, require_packages

LOOSE, INSTRUCTIONS = "loose", "instructions"


def judge(item: Item, answer: Written) -> Judgement:
    """Judge each instruction, strictly and loosely."""
    strict, loose = [], []
    instructions = instructions_of(item)
    for name, arguments in instructions:
        strict.append(follows(answer.text, name, arguments))
        loose.append(follows_loosely(answer.text, name, arguments))
    also = {LOOSE: all(loose)}
    for number, (kept, kept_loosely) in enumerate(zip(strict, loose, strict=True), 1):
        also |= {_key(number): kept, _key(number, LOOSE): kept_loosely}
    broken = [name for (name, _), kept in zip(instructions, strict, strict=True) if not kept]
    return Judgement(
        all(strict),
        f"{sum(strict)} of {len(strict)} instructions followed",
        also=also,
        note=f"not followed: {', '.join(broken)}" if broken else None,
    )


def average(judged: Judged) -> list[Score]:
    """Return the shares of prompts and of instructions, each strict and loose."""
    strict = [judgement.correct for _, judgement in judged]
    loose = [judgement.also[LOOSE] for _, judgement in judged]
    scores = [_score(MAIN, strict), _score(f"{MAIN}.{LOOSE}", loose)]
    for ending in ("", LOOSE):
        kept = [
            judgement.also[_key(number, ending)]
            for item, judgement in judged
            for number in range(1, len(instructions_of(item)) + 1)
        ]
        name = f"{INSTRUCTIONS}-{ending}" if ending else INSTRUCTIONS
        scores.append(_score(f"{MAIN}.{name}", kept, verdicts=kept))
    return scores


def instructions_of(item: Item) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the instructions of a prompt, each with its arguments."""
    return [(name, arguments) for name, arguments in json.loads(item.data["instructions"])]


def _score(metric: str, kept: Sequence[bool], verdicts: Sequence[bool] = ()) -> Score:
    return Score(metric, sum(kept) / len(kept), False, len(kept), verdicts=tuple(verdicts))


def _key(number: int, ending: str = "") -> str:
    return f"instruction {number} {ending}".strip()


def make(row: Row, _: str | None) -> Item:
    """Return the item of a prompt with its instructions."""
    prompt, where = text_columns(row, ("prompt",))["prompt"], row.where
    names, given, key = (row.data.get(name) for name in ("instruction_id_list", "kwargs", "key"))
    if not (isinstance(names, list) and names and isinstance(given, list) and len(names) == len(given)):
        raise DataError("a row needs instruction_id_list and kwargs of the same length", where=where)
    if not isinstance(key, int):
        raise DataError("a row needs a key, which is a number", where=where)
    require_text(prompt, "prompt", where)
    instructions = [[name, _arguments(name, found, where)] for name, found in zip(names, given, strict=True)]
    data = {"prompt": prompt, "instructions": json.dumps(instructions, ensure_ascii=False)}
    return Item(f"ifeval/{key}", None, data)


def _arguments(name: Any, given: Any, where: str) -> dict[str, Any]:
    """Return the arguments of an instruction, without the empty ones that the hub's copy adds."""
    if name not in CHECKS:
        raise DataError(f"no instruction of IFEval is called {name!r}", where=where)
    kept = {key: value for key, value in given.items() if value} if isinstance(given, dict) else {}
    for key, kind in CHECKS[name][1].items():
        value = kept.get(key)
        if kind is int and isinstance(value, float) and value.is_integer():
            kept[key] = value = int(value)  # a column with nulls becomes one of floats in some copies
        if not isinstance(value, kind):
            raise DataError(
                f"{name} has no {key}, or not as {kind.__name__}", where=where, hint="get the file again"
            )
    return kept


IFEVAL = Dataset(
    name="ifeval",
    make=make,
    counts={None: 541},
    hub="google/IFEval",
    split="train",
    files=("input_data.jsonl", "ifeval_input_data.jsonl"),  # in the authors' repository, and on the hub
)


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all prompts; there are neither subjects nor examples."""
    require_packages()
    return IFEVAL.items(source)


_task = partial(
    Task,
    name="ifeval",
    version=1,
    load=load,
    question="{prompt}",
    system=None,
    max_new_tokens=1280,
    judge=judge,
    average=average,
)
PROTOCOLS: tuple[Task, ...] = (_task(protocol="card"), _task(protocol="lm-eval"))
