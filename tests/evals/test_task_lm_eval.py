"""Beside lm-evaluation-harness 0.4.13 itself, where it is installed: same prompts, same verdicts.

What it made of questions of ours is recorded, and compared everywhere: test_task_golden.py.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import pytest
from evals.record_golden import harness_task, mmlu_files

from qwenq.evals.task import Choose, DataSource, Item, Write, Written
from qwenq.evals.tasks.registry import get_task

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm-evaluation-harness", allow_module_level=True)

ITEMS = 40
SUBJECT = "high_school_european_history"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_prompts_of_mmlu(shared_data: Path, tmp_path: Path) -> None:
    rows = {}
    for split in ("dev", "test"):
        path = shared_data / "mmlu" / split / f"{SUBJECT}_{split}.csv"
        with path.open(encoding="utf-8", newline="") as file:
            rows[split] = [tuple(row) for row in csv.reader(file)]
    theirs = harness_task("mmlu/default", f"mmlu_{SUBJECT}", mmlu_files(tmp_path, rows))
    theirs.build_all_requests(limit=ITEMS, rank=0, world_size=1)
    asked = [instance.args for instance in theirs.instances]
    task = get_task("mmlu", "lm-eval")
    ours = [task.request(item) for item in task.items(DataSource(folder=shared_data), [SUBJECT])[:ITEMS]]
    assert [
        (request.prompt, choice)
        for request in ours
        if isinstance(request, Choose)
        for choice in request.choices
    ] == asked


@pytest.mark.slow
def test_prompts_and_verdicts_of_gsm8k(shared_data: Path) -> None:
    files = {split: str(shared_data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    theirs = harness_task("gsm8k", "gsm8k", files)
    theirs.build_all_requests(limit=ITEMS, rank=0, world_size=1)
    task = get_task("gsm8k", "lm-eval")
    items = task.items(DataSource(folder=shared_data))[:ITEMS]
    for instance, item in zip(theirs.instances, items, strict=True):
        prompt, options = instance.args
        request = task.request(item)
        assert isinstance(request, Write)
        assert (request.prompt, list(request.until)) == (prompt, options["until"])
    compare_verdicts(theirs, items)


def compare_verdicts(theirs: Any, items: list[Item]) -> None:
    drawn = random.Random(0)
    task = get_task("gsm8k", "lm-eval")
    answers = [answer_like(item, drawn) for item in items]
    for instance, answer in zip(theirs.instances, answers, strict=True):
        instance.resps = [answer]
    theirs.apply_filters()
    seen = set()
    for instance, item, answer in zip(theirs.instances, items, answers, strict=True):
        ours = task.judge(item, Written(answer, 1, stopped=True))
        for name, verdict in (("strict-match", ours.correct), ("flexible-extract", ours.also["flexible"])):
            scored = theirs.process_results(instance.doc, [instance.filtered_resps[name]])
            assert bool(scored["exact_match"]) == verdict, (answer, item.data["answer"])
            seen.add((name, verdict))
    assert len(seen) == 4


def answer_like(item: Item, drawn: random.Random) -> str:
    """Right and wrong, with and without what an answer may have around its number."""
    number = item.data["answer"].rsplit("#### ", 1)[1]
    if drawn.random() < 0.3:
        number = str(drawn.randint(-5, 5000))
    before = drawn.choice(["#### ", "####", "The answer is ", "#### $", "so 3 and ", "", "#### -"])
    return (
        drawn.choice(["", "12 eggs.\n", "#### 5\n"])
        + before
        + number
        + drawn.choice(["", ".", ".00", ",", "%", "\n"])
    )
