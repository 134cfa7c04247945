"""Processes that measure a point together: whichever ends, nobody waits for it, and the rows say why."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from teams import free_port

from qwenq.profiling import child
from qwenq.profiling.meeting import Meeting
from qwenq.profiling.points import Point

WAITS = "import time; time.sleep(1000)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
ENDS = "raise SystemExit(2)"


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Meeting]]:
    """Of both ranks, in a store such as torchrun's own process holds."""
    from torch.distributed import TCPStore

    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(child, "_LOOK", 0.1)
    monkeypatch.setattr(child, "_ALONE", 0.5)
    yield [Meeting("point1/", rank) for rank in range(2)]
    del store


def runs(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_COMMAND", [sys.executable, "-c", source])


@pytest.mark.timeout(60)
def test_a_child_does_not_wait_for_one_that_was_killed(
    meetings: list[Meeting], points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it waits: gloo would for an hour, and the store without end."""
    leader, other = meetings
    runs(KILLED, monkeypatch)
    child.assist_in_child(points[0], None, other)
    runs(WAITS, monkeypatch)
    rows = list(child.measure_in_child(points[0], None, leader))
    assert [row.metric for row in rows] == list(points[0].metrics)
    why = "rank 1: its process was killed: most likely by the system, for want of memory"
    assert {(row.status, row.reason) for row in rows} == {("failed", why)}
    assert rows[0].details["again"]


@pytest.mark.timeout(60)
def test_those_who_assist_do_not_wait_for_a_leader_that_is_gone(
    meetings: list[Meeting], points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, other = meetings
    leader.say("failed", "it measures this point no more")
    runs(WAITS, monkeypatch)
    child.assist_in_child(points[0], None, other)
    assert other.ended() == ("failed", "rank 0: it measures this point no more")


def test_a_leader_that_ends_because_another_one_did_has_its_reason(
    meetings: list[Meeting], points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find what cannot run; whichever is first says it, and the other ends without a word."""
    leader, other = meetings
    row = points[0].without("unavailable", "rank 1: 1 head cannot be dealt out")[0].to_json()
    runs(f"import json; print(json.dumps({row!r}))", monkeypatch)
    child.assist_in_child(points[0], None, other)
    runs(ENDS, monkeypatch)
    rows = list(child.measure_in_child(points[0], None, leader))
    assert {(row.status, row.reason) for row in rows} == {
        ("unavailable", "rank 1: 1 head cannot be dealt out")
    }
    assert not rows[0].details  # it is not tried again


def test_a_leader_that_dies_of_its_own_says_so(
    meetings: list[Meeting], points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, other = meetings
    other.say("failed", "noticed")
    runs(KILLED, monkeypatch)
    (reason,) = {row.reason for row in child.measure_in_child(points[0], None, leader)}
    assert reason == "its process was killed: most likely by the system, for want of memory"


def test_points_have_meetings_of_their_own_and_the_first_word_counts(meetings: list[Meeting]) -> None:
    leader, other = meetings
    assert leader.ended() is None
    other.say("unavailable", "no")
    leader.say("failed", "later")
    assert leader.ended() == other.ended() == ("unavailable", "rank 1: no")
    assert Meeting("point2/", 0).ended() is None


@pytest.mark.timeout(120)
def test_a_store_that_is_gone_holds_nobody(meetings: list[Meeting], monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("Connection reset by peer")

        def compare_set(self, *_: str) -> None:
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(meetings[0], "_store", Gone())
    meetings[0].say("failed", "x")
    assert meetings[0].ended() == ("failed", "torchrun's store does not answer any more")
