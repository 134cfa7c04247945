"""How long a server is waited for, and what whoever waits is told."""

from __future__ import annotations

import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from evals.endpoint_server import Server, at, chat
from listening import notices_to

from qwenq.errors import QwenqError
from qwenq.evals.endpoint import open_served
from qwenq.http import (
    ATTEMPTS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    LONGEST_WAIT,
    ServerState,
    backoff_seconds,
    retry_after,
)

PAST = "Thu, 01 Jan 1970 00:00:00 GMT"
BEYOND = "Thu, 01 Jan 2026 00:00:00 +99999999999999"  # was an OverflowError


def test_every_pause_is_twice_the_last(server: Server, waits: list[float]) -> None:
    server.trouble = ["503"] * 100
    with pytest.raises(QwenqError):
        at(server, pause=FIRST_PAUSE).ask(chat("one"))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert backoff_seconds(20) == LONGEST_PAUSE


@pytest.mark.parametrize(("header", "seconds"), [
    ("7", 7.0), (" 90 ", 90.0), ("86400", LONGEST_WAIT), ("soon", 0.5), ("-3", 0.5), ("", 0.5), ("0", 0.5),
    (PAST, 0.5), (BEYOND, 0.5),
])  # fmt: skip
def test_retry_after_makes_the_pause_longer(
    server: Server, waits: list[float], header: str, seconds: float
) -> None:
    server.trouble, server.retry_after = ["429"], header
    assert at(server, pause=FIRST_PAUSE).ask(chat("one")).answer.text == "ONE"
    assert waits == [seconds]


@pytest.mark.parametrize("header", ["0", PAST, "3"])
def test_retry_after_zero_does_not_shorten_the_pause(server: Server, waits: list[float], header: str) -> None:
    """Many say 0 while they load their model, which takes a minute: all attempts would be over by then."""
    server.trouble, server.retry_after = ["429"] * 100, header
    with pytest.raises(QwenqError, match=f"{ATTEMPTS} attempts failed"):
        at(server, pause=FIRST_PAUSE).ask(chat("one"))
    least = 3.0 if header == "3" else 0.0
    assert waits == [max(least, own) for own in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)]


def test_retry_after_may_be_a_date() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after(in_a_minute) == pytest.approx(60, abs=2)
    assert retry_after(PAST) == 0
    assert retry_after(BEYOND) is None
    assert retry_after(None) is None


def test_retries_are_reported_with_the_attempts_left(server: Server, waits: list[float]) -> None:
    said: list[str] = []
    server.trouble = ["503", "503", "hang up"]
    at(server, state=ServerState(notices_to(said))).ask(chat("one"))
    assert len(waits) == len(said) == 3
    assert all(line.startswith(f"{server.url}: ") for line in said)
    assert "status 503" in said[0] and said[0].endswith("; retried in 0 s, 7 attempts left")
    assert said[1].endswith("6 attempts left")
    assert "503" not in said[2] and said[2].endswith("5 attempts left")


def test_requests_that_fail_together_are_reported_once() -> None:
    said: list[str] = []
    trouble = ServerState(notices_to(said))
    for attempt in (1, 2, 7):
        for _ in range(8):
            trouble.failed(attempt, "busy", 2.0)
    assert [line.split(", ")[1] for line in said] == ["7 attempts left", "6 attempts left", "1 attempt left"]
    trouble.passed()
    trouble.failed(1, "busy", 2.0)
    assert len(said) == 3, "a server that is busy now and then is not announced every time"
    trouble.failed(2, "busy", 2.0)
    assert len(said) == 4


def test_a_refused_first_connection_is_an_error_at_once(waits: list[float]) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # it does not listen
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        with pytest.raises(QwenqError, match="no server answers: Connection refused") as caught:
            open_served(url, "big/model", None)
    assert caught.value.where == url
    assert "has started" in str(caught.value.hint)
    assert waits == []


def test_a_server_that_has_answered_once_is_waited_for(waits: list[float]) -> None:
    said: list[str] = []
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = open_served(running.url, None, None, listener=notices_to(said))
        running.shutdown()
    with pytest.raises(QwenqError, match=f"{ATTEMPTS} attempts failed, the last: Connection refused"):
        endpoint.ask(chat("one"))
    assert len(waits) == len(said) == ATTEMPTS - 1
