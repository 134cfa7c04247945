"""The process that measures a point, seen from outside: started, read, and ended whatever it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Protocol

from qwenq.errors import QwenqError
from qwenq.profiling.points import Point
from qwenq.results import Model, Row, Status

_COMMAND = [sys.executable, "-m", "qwenq.profiling.point"]
_GRACE = 120.0
"""Seconds beyond three times its allowance after which a point counts as hung."""
_LOOK, _ALONE = 1.0, 15.0
"""Seconds between two looks at the others who measure a point; and how long a child may go on once one of
them is gone: most notice it by themselves, and say it better."""


class Others(Protocol):
    """The parents of those with whom a child measures its point, see ``meeting.Meeting``."""

    @property
    def name(self) -> str:
        """Where the children meet."""
        ...

    def say(self, status: Status, reason: str) -> None:
        """This one's child has ended."""
        ...

    def ended(self) -> tuple[Status, str] | None:
        """How the first of them ended that has; None: all go on."""
        ...


class EndedError(QwenqError):
    """A child that ended badly; ``alone``: whatever became of the others is not behind it."""

    alone = True


def probe(device: str) -> dict[str, Any]:
    """What the plan needs to know of the device; asked in a process of its own, which gives its memory back.

    That process reads the libraries of all that come after it, so it tells how long they take to start, too.

    Raises:
        QwenqError: the process failed.
    """
    began = time.monotonic()
    for content in _ask({"probe": device}, None):
        if "error" not in content:
            content["start_seconds"] = time.monotonic() - began - content.pop("worked_seconds")
        return content
    raise QwenqError("the device could not be looked at", where=device, hint="run again with --debug")


def measure_in_child(point: Point, seconds: float | None, others: Others | None = None) -> Iterator[Row]:
    """Rows of a point as they are measured; however its process ends, every metric has a row.

    Args:
        seconds: what it may take; None: no limit.
        others: who measure it together with this child, which leads; None: it is alone.
    """
    left = dict.fromkeys(point.metrics)
    try:
        for content in _ask(_request(point, seconds, others), _limit(seconds), others):
            row = _row(content)
            left.pop(row.metric, None)
            yield row
    except EndedError as error:
        told = None if others is None or error.alone else _heard(others)
        status, reason = told or ("failed", error.what)
        yield from point.without(status, reason, list(left), again=status == "failed")


def assist_in_child(point: Point, seconds: float | None, others: Others) -> None:
    """Take part in what the leader's child measures; if this one ends before that, the others are told."""
    try:
        for content in _ask(_request(point, seconds, others), _limit(seconds), others):
            row = _row(content)  # it has a row only for what it could not do
            others.say(row.status, row.reason or "")
    except EndedError as error:
        others.say("failed", error.what)


def _request(point: Point, seconds: float | None, others: Others | None) -> dict[str, Any]:
    return {"point": point.to_json(), "seconds": seconds, "meeting": others.name if others else None}


def _limit(seconds: float | None) -> float | None:
    return None if seconds is None else 3 * seconds + _GRACE


def _heard(others: Others) -> tuple[Status, str] | None:
    """What the others' parents say, which may take them as long as a process takes to end."""
    until = time.monotonic() + _ALONE
    while (told := others.ended()) is None and time.monotonic() < until:
        time.sleep(_LOOK / 4)
    return told


def _ask(
    request: dict[str, Any], limit: float | None, others: Others | None = None
) -> Iterator[dict[str, Any]]:
    """JSON lines of a child; it is killed when the reader goes away, by Ctrl-C for one.

    Raises:
        EndedError: it ended badly; says how, and its last words.
    """
    with tempfile.TemporaryFile() as words:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the child.
        child = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, start_new_session=True
        )
        assert child.stdin is not None and child.stdout is not None  # noqa: S101 - both are pipes
        try:
            with _watched(child, limit, others) as killed:
                with suppress(BrokenPipeError):
                    child.stdin.write(json.dumps({**request, "parent": os.getpid()}).encode())
                    child.stdin.close()
                for line in child.stdout:
                    if line.endswith(b"\n"):
                        yield json.loads(line)
                code = child.wait()
        finally:
            _end(child)
        if killed:
            raise killed[0]
        if code:
            error = EndedError(_how(code, _last_words(words)))
            error.alone = code < 0  # else it may have ended because another one did
            raise error


@contextmanager
def _watched(
    child: subprocess.Popen[bytes], limit: float | None, others: Others | None
) -> Iterator[list[EndedError]]:
    """Kill a child that is over its limit, or that waits for others of whom one is gone.

    Yields:
        Why it was killed; empty as long as it was not.
    """
    killed: list[EndedError] = []
    done, began = threading.Event(), time.monotonic()

    def watch() -> None:
        lost: float | None = None
        while not done.wait(_LOOK if others is not None else limit):
            now = time.monotonic()
            if others is not None and lost is None and others.ended() is not None:
                lost = now
            if limit is not None and now - began >= limit:
                killed.append(EndedError(f"it did not end within {limit:.0f} s"))
            elif lost is not None and now - lost >= _ALONE:
                killed.append(EndedError("another process of this point is gone"))
                killed[0].alone = False
            if killed:
                _kill(child)
                return

    if limit is not None or others is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield killed
    finally:
        done.set()


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        _kill(child)
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child's whole group: kernels may be compiling in processes of their own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _how(code: int, words: str) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed: most likely by the system, for want of memory"
    said = f": {words}" if words else ""
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}{said}"
    return f"its process ended with exit code {code}{said}"


def _last_words(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 2000))
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _row(content: dict[str, Any]) -> Row:
    fields = {key: value for key, value in content.items() if key not in ("format", "model")}
    return Row(model=Model(**content["model"]), **fields)
