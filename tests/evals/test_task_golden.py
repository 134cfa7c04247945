"""Prompts and verdicts are those of lm-evaluation-harness and thefuzz, as record_golden.py has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evals.golden_cases import SHOWN, SUBJECT, gsm8k_answers, texts_and_options, write_data
from evals.record_golden import GOLDEN, digest

from qwenq.evals.task import Choose, DataSource, Item, Write, Written
from qwenq.evals.tasks.choices import closest_option
from qwenq.evals.tasks.registry import get_task


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["found"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("golden"))


def gsm8k_items(data: Path) -> list[Item]:
    return get_task("gsm8k", "lm-eval").items(DataSource(folder=data))[:SHOWN]


def test_prompts_of_mmlu_are_the_harness_s(data: Path) -> None:
    task = get_task("mmlu", "lm-eval")
    asked = [task.request(item) for item in task.items(DataSource(folder=data), [SUBJECT])[:SHOWN]]
    ours = [
        (digest(one.prompt), choice) for one in asked if isinstance(one, Choose) for choice in one.choices
    ]
    assert ours == [tuple(one) for one in recorded("lm_eval")["mmlu"]]


def test_prompts_of_gsm8k_are_the_harness_s(data: Path) -> None:
    """Examples are drawn anew for each item, by the harness's own generator."""
    asked = [get_task("gsm8k", "lm-eval").request(item) for item in gsm8k_items(data)]
    ours = [(digest(str(one.prompt)), list(one.until)) for one in asked if isinstance(one, Write)]
    assert ours == [tuple(one) for one in recorded("lm_eval")["gsm8k"]]


def test_verdicts_of_gsm8k_are_the_harness_s(data: Path) -> None:
    task, items = get_task("gsm8k", "lm-eval"), gsm8k_items(data)
    theirs = recorded("lm_eval")["verdicts"]
    assert len(set(theirs)) == 4, "right and wrong by either reading"
    for (place, answer), verdict in zip(gsm8k_answers(), theirs, strict=True):
        ours = task.judge(items[place], Written(answer, 1, stopped=True))
        assert f"{ours.correct:d}{ours.also['flexible']:d}" == verdict, (answer, items[place].data["answer"])


def test_the_option_most_like_a_text_is_that_of_thefuzz_as_recorded() -> None:
    theirs = recorded("thefuzz")
    assert {found[0] for found in theirs} == {0, 1, 2, 3}
    for (text, options), found in zip(texts_and_options(), theirs, strict=True):
        place = closest_option(text, options)
        assert place is not None
        assert options[place] == options[found[0]], (text, options)
