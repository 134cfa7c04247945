"""The client against a server that misbehaves in every way a real one does, on loopback."""

from __future__ import annotations

import time
from typing import Any

import pytest
from evals.endpoint_server import Server, at, chat
from listening import notices_to

from qwenq import http, stopping
from qwenq.errors import QwenqError, UsageError
from qwenq.evals.endpoint import RemoteModel, open_served
from qwenq.evals.task import Write, Written, final_answer
from qwenq.http import ATTEMPTS, ServerState


def test_a_chat_is_sent_and_its_text_returned(server: Server) -> None:
    reply = at(server, key="secret").ask(chat("so?"))
    assert reply.answer.text == "SO?"
    assert (reply.answer.tokens, reply.prompt_tokens, reply.answer.stopped) == (3, 7, True)
    assert server.paths == ["/v1/chat/completions"]
    assert server.seen[0]["temperature"] == 0
    assert server.seen[0]["repetition_penalty"] == 1, "else vLLM takes that of the model's generation config"
    assert server.seen[0]["max_tokens"] == 32
    assert server.seen[0]["model"] == "big/model"
    assert server.keys == ["Bearer secret"]
    assert "secret" not in repr(at(server, key="secret"))


def test_plain_text_is_completed_and_cut_at_stop_strings(server: Server) -> None:
    ends = ("\nQ", "A", "B", "C", "X THAT")
    reply = at(server).ask(Write("keep x that goes", 8, ends[:1] + ends[4:]))
    assert server.paths == ["/v1/completions"]
    assert reply.answer.text == "KEEP "
    at(server).ask(Write("keep", 8, ends))
    assert server.seen[1]["stop"] == list(ends[:4]), "more than four are refused by servers"


def test_a_server_that_refuses_the_option_is_asked_without_it(server: Server) -> None:
    said: list[str] = []
    server.refuses = ("repetition_penalty",)
    endpoint = at(server, state=ServerState(notices_to(said)))
    assert [endpoint.ask(chat(text)).answer.text for text in ("one", "two")] == ["ONE", "TWO"]
    assert ["repetition_penalty" in one for one in server.seen] == [True, False, False]
    assert said == [f"{server.url}: this server refuses the option repetition_penalty, so it is left out"]
    server.refuses = ("temperature",)
    with pytest.raises(QwenqError, match=r"status 400.*temperature"):
        at(server).ask(chat("one"))


@pytest.mark.parametrize(("wish", "asked"), [("on", True), ("off", False), ("auto", False)])
def test_a_server_is_asked_to_let_the_model_think_or_not(wish: str, asked: bool, server: Server) -> None:
    found = open_served(server.url, None, None, wish)
    assert found.ask(chat("so?")).answer.text == "SO?"
    assert server.seen[0]["chat_template_kwargs"] == {"enable_thinking": asked}
    assert ("temperature" in server.seen[0]) is not asked, "greedy thoughts repeat themselves"
    assert ("seed" in server.seen[0]) is asked
    assert bool(found.thinking_notice) is (wish == "auto")
    found.ask(Write("plain text", 8))
    assert "chat_template_kwargs" not in server.seen[1]


def test_what_was_not_typed_is_left_out_where_a_server_refuses_it(server: Server) -> None:
    said: list[str] = []
    server.refuses = ("chat_template_kwargs", "repetition_penalty")
    found = open_served(server.url, None, None, "auto", listener=notices_to(said))
    assert [found.ask(chat(text)).answer.text for text in ("one", "two")] == ["ONE", "TWO"]
    assert [len(one.keys() & set(server.refuses)) for one in server.seen] == [2, 1, 0, 0]
    assert [line.partition("refuses the option ")[2] for line in said] == [
        f"{name}, so it is left out" for name in server.refuses
    ]
    with pytest.raises(QwenqError, match=r"status 400.*chat_template_kwargs"):
        open_served(server.url, None, None, "off").ask(chat("one"))


@pytest.mark.parametrize(
    ("content", "judged"), [("2", "2"), (None, "")], ids=["thoughts and answer", "cut in its thoughts"]
)
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thoughts_that_a_server_sets_apart_are_recorded_and_not_judged(
    monkeypatch: pytest.MonkeyPatch, key: str, content: str | None, judged: str
) -> None:
    thinks = RemoteModel(http.Server("http://h/v1"), "m", thinking=True)
    message = {"role": "assistant", "content": content, key: "1 + 1"}
    answer_always(monkeypatch, {"choices": [{"message": message, "finish_reason": "stop"}]})
    written = thinks.ask(chat("1 + 1?")).answer
    assert isinstance(written, Written)
    assert written.text.startswith("<think>1 + 1")
    assert final_answer(written, thinking=True) == judged


@pytest.mark.parametrize("trouble", ["429", "500", "503", "silent", "hang up", "half", "no json"])
def test_temporary_errors_are_retried_and_count_once(server: Server, trouble: str) -> None:
    server.trouble = [trouble, trouble]
    replies = list(at(server, concurrency=1).ask_all([chat("one"), chat("two")]))
    assert [(index, reply.answer.text) for index, reply in replies] == [(0, "ONE"), (1, "TWO")]
    assert len(server.seen) == 4


def test_after_the_last_attempt_the_error_has_the_reason(server: Server) -> None:
    server.trouble = ["503"] * 100
    with pytest.raises(QwenqError, match=rf"{ATTEMPTS} attempts failed, the last: status 503.*trouble 503"):
        at(server).ask(chat("one"))
    assert len(server.seen) == ATTEMPTS


@pytest.mark.parametrize(("status", "hint"), [
    ("401", "OPENAI_API_KEY"), ("404", "ends in /v1"), ("400", "see the server's message"),
])  # fmt: skip
def test_a_refusal_is_not_retried(server: Server, status: str, hint: str) -> None:
    server.trouble = [status]
    with pytest.raises(QwenqError, match=f"status {status}.*trouble {status}") as caught:
        at(server).ask(chat("one"))
    assert hint in str(caught.value)
    assert len(server.seen) == 1


@pytest.mark.parametrize("trouble", ["redirect", "no answer", "parts"])
def test_neither_redirects_nor_other_interfaces_are_followed(server: Server, trouble: str) -> None:
    server.trouble = [trouble]
    with pytest.raises(QwenqError):
        at(server, key="secret").ask(chat("one"))
    assert len(server.seen) == 1


def test_requests_are_limited_to_the_concurrency(server: Server) -> None:
    server.pause = 0.03
    replies = dict(at(server, concurrency=3).ask_all([chat(f"q{n}") for n in range(12)]))
    assert {index: reply.answer.text for index, reply in replies.items()} == {n: f"Q{n}" for n in range(12)}
    assert server.most_busy == 3


def test_an_error_stops_requests_that_were_not_sent(server: Server) -> None:
    server.pause = 0.02
    server.trouble = ["", "400"]
    with pytest.raises(QwenqError, match="status 400"):
        list(at(server, concurrency=1).ask_all([chat(f"q{n}") for n in range(30)]))
    time.sleep(0.1)
    assert len(server.seen) <= 4


def test_the_model_is_looked_for_before_anything_is_asked(server: Server) -> None:
    assert open_served(server.url + "/", None, None).name == "big/model"
    assert open_served(server.url, "big/model", None).url == server.url
    with pytest.raises(UsageError, match="small is not served there") as caught:
        open_served(server.url, "small", None)
    assert "big/model" in str(caught.value)
    with pytest.raises(UsageError, match="not an address"):
        open_served("localhost:8000", None, None)
    assert server.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/v1",
        "http://h:99999/v1",
        "http://h:x/v1",
        "http://h :80/v1",
        "ftp://h/v1",
        "http://h\n/v1",
        "http://a..b/v1",
        f"http://{'a' * 70}.com/v1",
        "http://h/v1é",
        "http://user:password@h/v1",
        "http://h/v1?version=1",
        "http://h/v1#here",
        "",
    ],
)
def test_an_invalid_address_is_refused_before_any_request(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        open_served(url, None, None)


def test_a_key_is_stripped_and_checked(server: Server) -> None:
    open_served(server.url, None, "secret\n").ask(chat("one"))
    assert server.keys == ["Bearer secret"]
    for key in ("a\nb", "schlüssel", "a\x00"):
        with pytest.raises(UsageError, match="a key cannot have") as caught:
            open_served(server.url, None, key)
        assert caught.value.where == "OPENAI_API_KEY"


def test_after_sigterm_a_server_that_is_busy_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.trouble = ["503"] * 9
    once = http.Server._once

    def signalled(self: http.Server, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        stopping.note()
        return once(self, path, body)

    monkeypatch.setattr(http.Server, "_once", signalled)
    with pytest.raises(stopping.Terminated), stopping.finishing("it is recorded"):
        list(at(server).ask_all([chat("a")]))
    assert len(server.seen) == 1


def answer_always(monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]) -> None:
    """Let any server reply with this, whatever it is asked."""
    monkeypatch.setattr(http.Server, "_once", lambda self, path, body: said)


def test_odd_values_of_a_server_are_no_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = RemoteModel(http.Server("http://h/v1"), "m")
    answer_always(monkeypatch, {"data": [None, 5, "x", {"id": 5}, {"id": None}, {"id": "m"}]})
    assert odd.server.models() == ["m"]
    for count in (float("inf"), float("nan"), "many", []):
        usage = {"completion_tokens": count or {"x": 1}}
        answer_always(monkeypatch, {"choices": [{"text": "a"}], "usage": usage})
        with pytest.raises(QwenqError, match="a reply without an answer"):
            odd.ask(Write("p", 1))


def test_https_to_an_http_server_is_an_error_at_once(server: Server, waits: list[float]) -> None:
    with pytest.raises(QwenqError, match=r"no server answers: .*wrong version number") as caught:
        open_served(server.url.replace("http:", "https:"), "big/model", None)
    assert "http or https" in str(caught.value.hint)
    assert waits == []


@pytest.mark.parametrize(
    ("reason", "stopped"), [("stop", True), ("eos_token", True), (None, True), ("length", False)]
)
def test_only_finish_reason_length_counts_as_cut(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, stopped: bool
) -> None:
    """What else ends one, servers say in words of their own. A model that only thought said nothing: null."""
    odd = RemoteModel(http.Server("http://h/v1"), "m")
    message = {"role": "assistant", "content": None, "reasoning_content": "hm"}
    answer_always(monkeypatch, {"choices": [{"message": message, "finish_reason": reason}]})
    assert odd.ask(Write("p", 1)).answer == Written("", 0, stopped)
