"""The client against a server that misbehaves in every way a real one does, on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command_shell import Shell

from qwenq import stopping
from qwenq.errors import QwenqError, UsageError
from qwenq.evals.endpoint import Endpoint, endpoint_at
from qwenq.evals.patience import (
    ATTEMPTS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LONGEST_WAIT,
    Trouble,
    pause_before,
    retry_after,
)
from qwenq.evals.records import read_records
from qwenq.evals.rows import rows_of
from qwenq.evals.run import Plan, answer
from qwenq.evals.served import Contestant, Served
from qwenq.evals.task import Choose, DataSource, Item, Judgement, Score, Write
from qwenq.results import append_row


class Server(ThreadingHTTPServer):
    """Answers a chat with its last message in capitals; ``trouble`` says what goes wrong, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.busy = self.most_busy = 0
        self.pause = 0.0
        self.retry_after = ""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "big/model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(asked)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
            trouble = self.server.trouble.pop(0) if self.server.trouble else ""
        time.sleep(self.server.pause)
        with self.server.lock:  # before the answer: whoever has it may ask again at once
            self.server.busy -= 1
        self._answer(asked, trouble)

    def _answer(self, asked: dict[str, Any], trouble: str) -> None:
        if trouble.isdigit():
            self._send(int(trouble), {"error": {"message": f"trouble {trouble}"}})
        elif trouble == "silent":
            time.sleep(1.0)
        elif trouble == "hang up":
            self.connection.close()
        elif trouble == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
        elif trouble == "no json":
            self._send(200, "<html>")
        elif trouble == "no answer":
            self._send(200, {"choices": []})
        elif trouble == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
        elif "messages" in asked:
            text = asked["messages"][-1]["content"].upper()
            self._send(200, _reply({"message": {"role": "assistant", "content": text}}))
        else:
            self._send(200, _reply({"text": asked["prompt"].upper()}))

    def _send(self, status: int, content: Any) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        if status == 429 and self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _reply(choice: dict[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return {"choices": [{"finish_reason": "stop", **choice}], "usage": usage}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited; nothing waits, and no pause is drawn at random."""
    found: list[float] = []
    monkeypatch.setattr("qwenq.evals.endpoint.wait", found.append)
    monkeypatch.setattr("qwenq.evals.patience.random.uniform", lambda low, high: (low + high) / 2)
    return found


def at(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(server.url, **{"model": "big/model", "timeout": 0.3, "pause": 0.001, **changes})


def chat(text: str) -> Write:
    return Write(({"role": "user", "content": text},), 32)


def test_a_chat_goes_out_and_its_text_comes_back(server: Server) -> None:
    reply = at(server, key="secret").ask(chat("so?"))
    assert reply.written.text == "SO?"
    assert (reply.written.tokens, reply.prompt_tokens, reply.written.stopped) == (3, 7, True)
    assert server.paths == ["/v1/chat/completions"]
    assert server.seen[0]["temperature"] == 0
    assert server.seen[0]["max_tokens"] == 32
    assert server.seen[0]["model"] == "big/model"
    assert server.keys == ["Bearer secret"]
    assert "secret" not in repr(at(server, key="secret"))


def test_plain_text_is_completed_and_cut_where_the_task_says(server: Server) -> None:
    ends = ("\nQ", "A", "B", "C", "X THAT")
    reply = at(server).ask(Write("keep x that goes", 8, ends[:1] + ends[4:]))
    assert server.paths == ["/v1/completions"]
    assert reply.written.text == "KEEP "
    at(server).ask(Write("keep", 8, ends))
    assert server.seen[1]["stop"] == list(ends[:4]), "more than four are refused by servers"


@pytest.mark.parametrize("trouble", ["429", "500", "503", "silent", "hang up", "half", "no json"])
def test_what_passes_is_asked_again_and_counts_once(server: Server, trouble: str) -> None:
    server.trouble = [trouble, trouble]
    replies = list(at(server, concurrency=1).ask_all([chat("one"), chat("two")]))
    assert [(index, reply.written.text) for index, reply in replies] == [(0, "ONE"), (1, "TWO")]
    assert len(server.seen) == 4


def test_after_many_attempts_it_is_an_error_that_says_why(server: Server) -> None:
    server.trouble = ["503"] * 100
    with pytest.raises(QwenqError, match=rf"{ATTEMPTS} attempts failed, the last: status 503.*trouble 503"):
        at(server).ask(chat("one"))
    assert len(server.seen) == ATTEMPTS


def test_every_pause_is_twice_the_last(server: Server, waits: list[float]) -> None:
    server.trouble = ["503"] * 100
    with pytest.raises(QwenqError):
        at(server, pause=FIRST_PAUSE).ask(chat("one"))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert pause_before(20) == LONGEST_PAUSE


@pytest.mark.parametrize(("header", "seconds"), [
    ("7", 7.0), (" 90 ", 90.0), ("86400", LONGEST_WAIT), ("soon", 0.5), ("-3", 0.5), ("", 0.5),
])  # fmt: skip
def test_as_long_as_the_server_says(server: Server, waits: list[float], header: str, seconds: float) -> None:
    server.trouble, server.retry_after = ["429"], header
    assert at(server, pause=FIRST_PAUSE).ask(chat("one")).written.text == "ONE"
    assert waits == [seconds]


def test_a_server_may_name_a_date() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after(in_a_minute) == pytest.approx(60, abs=2)
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert retry_after(None) is None


def test_what_is_asked_again_is_said_and_counted_down(server: Server, waits: list[float]) -> None:
    said: list[str] = []
    server.trouble = ["503", "503", "hang up"]
    at(server, trouble=Trouble(said.append)).ask(chat("one"))
    assert len(waits) == len(said) == 3
    assert all(line.startswith(f"{server.url}: ") for line in said)
    assert "status 503" in said[0] and said[0].endswith("; asked again in 0 s, 7 attempts left")
    assert said[1].endswith("6 attempts left")
    assert "503" not in said[2] and said[2].endswith("5 attempts left")


def test_requests_that_fail_together_say_so_once() -> None:
    said: list[str] = []
    trouble = Trouble(said.append)
    for attempt in (1, 2, 7):
        for _ in range(8):
            trouble.failed(attempt, "busy", 2.0)
    assert [line.split(", ")[1] for line in said] == ["7 attempts left", "6 attempts left", "1 attempt left"]
    trouble.passed()
    trouble.failed(1, "busy", 2.0)
    assert len(said) == 3, "a server that is busy now and then is not announced every time"
    trouble.failed(2, "busy", 2.0)
    assert len(said) == 4


def test_where_nothing_ever_answered_a_refused_connection_is_an_error_at_once(waits: list[float]) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # it does not listen
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        with pytest.raises(QwenqError, match="nothing answers there: Connection refused") as caught:
            endpoint_at(url, "big/model", None)
    assert caught.value.where == url
    assert "has started" in str(caught.value.hint)
    assert waits == []


def test_a_server_that_has_answered_once_is_waited_for(waits: list[float]) -> None:
    said: list[str] = []
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = endpoint_at(running.url, None, None, say=said.append)
        running.shutdown()
    with pytest.raises(QwenqError, match=f"{ATTEMPTS} attempts failed, the last: Connection refused"):
        endpoint.ask(chat("one"))
    assert len(waits) == len(said) == ATTEMPTS - 1


@pytest.mark.parametrize(("status", "hint"), [
    ("401", "OPENAI_API_KEY"), ("404", "ends in /v1"), ("400", "see what the server says"),
])  # fmt: skip
def test_a_refusal_is_not_asked_again(server: Server, status: str, hint: str) -> None:
    server.trouble = [status]
    with pytest.raises(QwenqError, match=f"status {status}.*trouble {status}") as caught:
        at(server).ask(chat("one"))
    assert hint in str(caught.value)
    assert len(server.seen) == 1


@pytest.mark.parametrize("trouble", ["redirect", "no answer"])
def test_neither_redirects_nor_other_interfaces_are_followed(server: Server, trouble: str) -> None:
    server.trouble = [trouble]
    with pytest.raises(QwenqError):
        at(server, key="secret").ask(chat("one"))
    assert len(server.seen) == 1


def test_only_so_many_at_a_time(server: Server) -> None:
    server.pause = 0.03
    replies = dict(at(server, concurrency=3).ask_all([chat(f"q{n}") for n in range(12)]))
    assert {index: reply.written.text for index, reply in replies.items()} == {n: f"Q{n}" for n in range(12)}
    assert server.most_busy == 3


def test_an_error_stops_what_was_not_begun(server: Server) -> None:
    server.pause = 0.02
    server.trouble = ["", "400"]
    with pytest.raises(QwenqError, match="status 400"):
        list(at(server, concurrency=1).ask_all([chat(f"q{n}") for n in range(30)]))
    time.sleep(0.1)
    assert len(server.seen) <= 4


def test_the_model_is_looked_for_before_anything_is_asked(server: Server) -> None:
    assert endpoint_at(server.url + "/", None, None).model == "big/model"
    assert endpoint_at(server.url, "big/model", None).url == server.url
    with pytest.raises(UsageError, match="small is not served there") as caught:
        endpoint_at(server.url, "small", None)
    assert "big/model" in str(caught.value)
    with pytest.raises(UsageError, match="no address"):
        endpoint_at("localhost:8000", None, None)
    assert server.seen == []


class Shout:
    """A task: the answer is right when it is the question in capitals."""

    name, protocol, version, needs_sandbox = "shout", "card", 1, False

    def __init__(self, *, choose: bool = False) -> None:
        self._choose = choose

    def items(self, *_: Any) -> list[Item]:
        return [Item(f"shout/{n}", None, {"q": f"word{n}"}) for n in range(6)]

    def request(self, item: Item) -> Write | Choose:
        return Choose(item.data["q"], ("A", "B")) if self._choose else chat(item.data["q"])

    def judge(self, item: Item, found: Any) -> Judgement:
        return Judgement(found.text == item.data["q"].upper(), found.text)

    def scores(self, judged: Any) -> list[Score]:
        return [Score("accuracy", sum(j.correct for _, j in judged) / len(judged), False, len(judged))]

    def notes(self, _: Any) -> list[str]:
        return []


class Quiet:
    """A listener who counts."""

    def __init__(self) -> None:
        self.recorded, self.verdicts = -1, 0

    def started(self, _: Contestant, __: Plan, recorded: int) -> None:
        self.recorded = recorded

    def judged(self, _: bool | None) -> None:
        self.verdicts += 1

    def finished(self) -> None:
        pass

    def running(self, _: int) -> None:
        raise AssertionError

    def ran(self, _: bool) -> None:
        raise AssertionError


def ask(server: Server, run: Path, task: Shout) -> tuple[Any, Quiet]:
    listener = Quiet()
    plan = Plan(task, task.items(), source=DataSource())  # type: ignore[arg-type]
    return answer(Served(at(server, concurrency=1)), plan, run, listener), listener


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
    records = read_records(file)
    assert sorted(record.id for record in records) == [f"shout/{n}" for n in range(6)]
    assert {record.implementation for record in records} == {f"big/model served at {server.url}"}
    assert records[0].prompt_tokens == 7


def test_after_sigterm_what_was_asked_is_recorded_and_no_more_asked(server: Server, tmp_path: Path) -> None:
    class Told(Quiet):
        def judged(self, _: bool | None) -> None:
            super().judged(_)
            if self.verdicts == 2:
                assert stopping.note() is not None

    task, listener = Shout(), Told()
    server.pause = 0.05  # the third is under way when the second has been judged
    plan = Plan(task, task.items(), source=DataSource())  # type: ignore[arg-type]
    with pytest.raises(stopping.Terminated):
        answer(Served(at(server, concurrency=1)), plan, tmp_path, listener)  # type: ignore[arg-type]
    (file,) = (tmp_path / "records").glob("*.jsonl")
    assert [record.id for record in read_records(file)] == ["shout/0", "shout/1", "shout/2"]
    assert len(server.seen) == 3
    assert not stopping.asked()
    server.pause = 0.0
    _, again = ask(server, tmp_path, task)
    assert (again.recorded, again.verdicts) == (3, 3)


def test_after_sigterm_a_server_that_is_busy_is_not_waited_for(server: Server, tmp_path: Path) -> None:
    server.trouble = ["503"] * 9

    class Patient(Endpoint):
        def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
            stopping.note()
            return super()._once(path, body)

    with pytest.raises(stopping.Terminated), stopping.finishing("it is recorded"):
        list(Patient(server.url, "big/model", pause=0.001).ask_all([chat("a")]))
    assert len(server.seen) == 1


def test_scoring_protocols_are_refused_before_anything_is_asked(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a server only writes"):
        ask(server, tmp_path, Shout(choose=True))
    assert server.seen == []


def test_rows_say_that_nobody_here_saw_the_weights(server: Server) -> None:
    served = Served(at(server))
    assert (served.model.name, served.model.precision) == ("model", "served")
    assert served.model.fingerprint.startswith("endpoint:")
    assert served.model.fingerprint != Served(at(server, model="other")).model.fingerprint
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
        served = Served(at(server, model=model))
        plan = Plan(Shout(), Shout().items(), source=DataSource())  # type: ignore[arg-type]
        answers = answer(served, plan, tmp_path / folder, Quiet())  # type: ignore[arg-type]
        if folder == "after":
            wrong = [(item, replace(verdict, correct=False)) for item, verdict in answers.judged]
            answers = replace(answers, judged=wrong)
        for row in rows_of(served, plan, answers, None, {"dtype": served.how.dtype}):
            append_row(tmp_path / folder, row)
    ran = Shell("compare", monkeypatch, capsys)(tmp_path / "before", tmp_path / "after")
    assert ran.code == 1, ran.err
    assert "6 lost, 0 won, p = 0.031" in ran.out
