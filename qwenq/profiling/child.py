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
from contextlib import suppress
from typing import IO, Any

from qwenq.errors import QwenqError
from qwenq.profiling.points import Point
from qwenq.results import Model, Row

_COMMAND = [sys.executable, "-m", "qwenq.profiling.point"]
_GRACE = 120.0
"""Seconds beyond three times its allowance after which a point counts as hung."""


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


def measure_in_child(point: Point, seconds: float | None, meeting: str | None = None) -> Iterator[Row]:
    """Rows of a point as they are measured; however its process ends, every metric has a row.

    Args:
        seconds: what it may take; None: no limit.
        meeting: where the children of several ranks meet to measure it together; None: it is alone.
    """
    left = dict.fromkeys(point.metrics)
    limit = None if seconds is None else 3 * seconds + _GRACE
    try:
        for content in _ask({"point": point.to_json(), "seconds": seconds, "meeting": meeting}, limit):
            row = _row(content)
            left.pop(row.metric, None)
            yield row
    except QwenqError as error:
        yield from point.without("failed", error.what, list(left), again=True)


def assist_in_child(point: Point, seconds: float | None, meeting: str) -> None:
    """Take part in what the leader's child measures; how that ends is the leader's to tell."""
    limit = None if seconds is None else 3 * seconds + _GRACE
    request = {"point": point.to_json(), "seconds": seconds, "meeting": meeting}
    with suppress(QwenqError):
        for _ in _ask(request, limit):
            pass


def _ask(request: dict[str, Any], limit: float | None) -> Iterator[dict[str, Any]]:
    """JSON lines of a child; it is killed when the reader goes away, by Ctrl-C for one.

    Raises:
        QwenqError: it ended badly; says how, and its last words.
    """
    with tempfile.TemporaryFile() as words:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the child.
        child = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, start_new_session=True
        )
        assert child.stdin is not None and child.stdout is not None  # noqa: S101 - both are pipes
        late = threading.Event()
        timer = threading.Timer(limit, _expire, (child, late)) if limit else None
        try:
            if timer:
                timer.start()
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
            for line in child.stdout:
                if line.endswith(b"\n"):
                    yield json.loads(line)
            code = child.wait()
        finally:
            if timer:
                timer.cancel()
            _end(child)
        if late.is_set():
            raise QwenqError(f"it did not end within {limit:.0f} s")
        if code:
            raise QwenqError(_how(code, _last_words(words)))


def _expire(child: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    _kill(child)


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
