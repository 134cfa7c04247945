"""A model that is served, through the same tasks, records and rows as one that is loaded here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_shell import Shell
from evals.endpoint_server import Server, at, chat

from qwenq import stopping
from qwenq.errors import QwenqError, UsageError
from qwenq.evals.answer_log import read_answer_log
from qwenq.evals.endpoint import CONCURRENCY
from qwenq.evals.rows import rows_of
from qwenq.evals.run import TaskPlan, answer
from qwenq.evals.task import Choose, DataSource, Item, Judgement, Score, Write
from qwenq.events import Advance, Event, Start
from qwenq.results import append_row, read_rows


class Shout:
    """A task: the answer is right when it is the question in capitals."""

    name, protocol, version, needs_sandbox = "shout", "card", 1, False

    def items(self, *_: Any) -> list[Item]:
        return [Item(f"shout/{n}", None, {"q": f"word{n}"}) for n in range(6)]

    def request(self, item: Item, _: int | None = None) -> Write | Choose:
        return chat(item.data["q"])

    def judge(self, item: Item, found: Any) -> Judgement:
        return Judgement(found.text == item.data["q"].upper(), found.text)

    def scores(self, judged: Any) -> list[Score]:
        verdicts = [judgement.correct for _, judgement in judged]
        return [Score("accuracy", sum(verdicts) / len(verdicts), False, verdicts)]

    def notes(self, _: Any) -> list[str]:
        return []


class Quiet:
    """A listener that counts."""

    def __init__(self) -> None:
        self.recorded, self.verdicts = -1, 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Start):
            assert event.unit == "items"
            self.recorded = event.done
        elif isinstance(event, Advance):
            self.verdicts += 1


def ask(server: Server, run: Path, task: Shout) -> tuple[Any, Quiet]:
    listener = Quiet()
    plan = TaskPlan(task, task.items(), source=DataSource())  # type: ignore[arg-type]
    return answer(at(server, concurrency=1), plan, run, listener), listener


def test_a_run_that_broke_goes_on_and_asks_nothing_twice(server: Server, tmp_path: Path) -> None:
    server.trouble = ["", "503", "", "400"]  # the third question is refused
    with pytest.raises(QwenqError, match="status 400"):
        ask(server, tmp_path, Shout())
    time.sleep(0.1)  # a question that was under way when the error came
    asked = len(server.seen)
    answers, listener = ask(server, tmp_path, Shout())
    assert (listener.recorded, listener.verdicts) == (2, 4)
    assert len(server.seen) == asked + 4
    assert [judgement.correct for _, judgement in answers.judged] == [True] * 6
    (file,) = (tmp_path / "records").glob("*.jsonl")
    records = read_answer_log(file)
    assert sorted(record.id for record in records) == [f"shout/{n}" for n in range(6)]
    assert {record.implementation for record in records} == {f"big/model served at {server.url}"}
    assert records[0].prompt_tokens == 7


def test_after_sigterm_what_was_asked_is_recorded_and_no_more_asked(server: Server, tmp_path: Path) -> None:
    class Told(Quiet):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Advance) and self.verdicts == 2:
                assert stopping.note() is not None

    task, listener = Shout(), Told()
    server.pause = 0.05  # the third is under way when the second has been judged
    plan = TaskPlan(task, task.items(), source=DataSource())  # type: ignore[arg-type]
    with pytest.raises(stopping.Terminated):
        answer(at(server, concurrency=1), plan, tmp_path, listener)  # type: ignore[arg-type]
    (file,) = (tmp_path / "records").glob("*.jsonl")
    assert [record.id for record in read_answer_log(file)] == ["shout/0", "shout/1", "shout/2"]
    assert len(server.seen) == 3
    assert not stopping.asked()
    server.pause = 0.0
    _, again = ask(server, tmp_path, task)
    assert (again.recorded, again.verdicts) == (3, 3)


def test_recorded_answers_of_a_server_are_reported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody can tell whether the address still serves the same weights; whoever started it can."""
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    command = Shell("eval", monkeypatch, capsys)
    options = ["--endpoint", server.url, "--sample", "--tasks", "gsm8k", "--out", tmp_path / "run"]
    first = command(*options, "--limit", 1)
    assert first.code == 0, first.err
    assert "served before" not in first.err
    again = command(*options, "--limit", 3)
    assert "note: 1 answer is recorded from this address already; --out NEW asks again" in again.err
    assert len(server.seen) == 3
    assert [row.settings.get("batch") for row in read_rows(tmp_path / "run")] == [CONCURRENCY, None]
    third = command(*options, "--limit", 3)
    assert "note: 3 answers are recorded from this address already" in third.err


def test_answers_cut_by_the_server_are_reported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("evals.endpoint_server.FINISHED", "length")
    ran = Shell("eval", monkeypatch, capsys)(
        *("--endpoint", server.url, "--sample", "--tasks", "gsm8k", "--limit", 2, "--out", tmp_path / "run")
    )
    assert ran.code == 0, ran.err
    assert "note: model served: 2 of 2 answers to gsm8k were cut at their limit of tokens" in ran.err


def test_continuations_of_a_chat_are_refused_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    class Chat(Shout):
        def request(self, item: Item, _: int | None = None) -> Choose:
            return Choose(({"role": "user", "content": item.data["q"]},), ("A", "B"))

    with pytest.raises(UsageError, match="scores continuations of a chat"):
        ask(server, tmp_path, Chat())
    assert server.seen == []


def test_rows_of_a_served_model_have_no_weights_fingerprint(server: Server) -> None:
    served = at(server)
    assert (served.model.name, served.model.precision) == ("model", "served")
    assert served.model.fingerprint.startswith("endpoint:")
    assert served.model.fingerprint != at(server, model="other").model.fingerprint
    assert not served.quantised
    served.unload()


@pytest.mark.parametrize("named", ["model", "model-GPTQ-Int4"])
def test_two_served_models_are_compared_item_by_item(
    server: Server,
    tmp_path: Path,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one family, also where a quantised one is served under a name of its own."""
    for folder, model in (("before", "model"), ("after", named)):
        served = at(server, model=model)
        plan = TaskPlan(Shout(), Shout().items(), source=DataSource())  # type: ignore[arg-type]
        answers = answer(served, plan, tmp_path / folder, Quiet())  # type: ignore[arg-type]
        if folder == "after":
            wrong = [(item, replace(verdict, correct=False)) for item, verdict in answers.judged]
            answers = replace(answers, judged=wrong)
        for row in rows_of(served, plan, answers, None, {"dtype": served.settings["dtype"]}):
            append_row(tmp_path / folder, row)
    ran = Shell("compare", monkeypatch, capsys)(tmp_path / "before", tmp_path / "after")
    assert ran.code == 1, ran.err
    assert "6 lost, 0 won, p = 0.031" in ran.out
