"""Run a point in processes of its own: start them, read the rows of rank 0, end them whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from qwenq.errors import QwenqError
from qwenq.profiling.spec import Point
from qwenq.results import Model, Row, Status
from qwenq.stopping import with_parent

_COMMAND = [sys.executable, "-m", "qwenq.profiling.worker"]
AHEAD = "--ahead"  # tells the worker to read the libraries before its point
_GRACE = 120.0  # seconds beyond three times its time limit after which a point counts as hung
_POLL, _OTHERS_GRACE = 1.0, 15.0
"""Seconds between two looks at the other ranks; and how long the rest may go on after one of them ended:
they mostly notice it by themselves, and their own error says more."""


class _ChildError(QwenqError):
    """The processes ended without an answer; ``status`` is that of the rows that are missing."""

    def __init__(self, reason: str, status: Status = "failed") -> None:
        super().__init__(reason)
        self.status = status


def probe(device: str) -> dict[str, Any]:
    """Return what the plan needs to know of the device, found by a process whose memory is given back.

    It reads the same libraries as every process after it, so its start is timed, too.
    """
    began = time.monotonic()
    for content in _ask({"probe": device}, None, _start(1)):
        if "error" not in content:
            content["start_seconds"] = time.monotonic() - began - content.pop("worked_seconds")
        return content
    raise QwenqError(
        "the process that examines the device failed", where=device, hint="run again with --debug"
    )


class StartedAhead:
    """Measure points in processes of their own, the next of which is started while one is measured.

    On a GPU: reading the libraries takes several seconds and needs none of it, and other cores are idle. The
    process computes nothing and does not open the device before its point is sent. Close it at the end.
    """

    def __init__(self) -> None:
        self._next: _Child | None = None

    def __call__(self, point: Point, seconds: float | None) -> Iterator[Row]:
        """Yield the rows of `measure_in_child`."""
        if point.tp > 1:
            yield from measure_in_child(point, seconds)
            return
        child = self._next or _Child.start([*_COMMAND, AHEAD])
        self._next = _Child.start([*_COMMAND, AHEAD])
        yield from measure_in_child(point, seconds, child)

    def close(self) -> None:
        """End the process that has no point."""
        if self._next is not None:
            self._next.end()


def measure_in_child(point: Point, seconds: float | None, started: _Child | None = None) -> Iterator[Row]:
    """Yield a point's rows as they are measured; every metric has one, however the processes end.

    Args:
        point: ``point.tp`` processes hold its model together; rank 0 measures.
        seconds: time limit of the point; None: no limit.
        started: its only process; None: it is started now.
    """
    missing = dict.fromkeys(point.metrics)
    limit = None if seconds is None else 3 * seconds + _GRACE
    try:
        children = [started] if started else _start(point.tp)
        for content in _ask({"point": point.to_json(), "seconds": seconds}, limit, children):
            row = _row(content)
            missing.pop(row.metric, None)
            yield row
    except _ChildError as error:
        again = error.status == "failed"
        yield from point.without(error.status, error.what, list(missing), again=again)


@dataclass
class _Child:
    """A process, and the file of its standard error."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]

    @classmethod
    def start(cls, command: list[str], variables: dict[str, str] | None = None) -> _Child:
        """Start it in a session of its own: Ctrl-C reaches this process alone, which then ends the child."""
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env=with_parent(variables),
        )
        return cls(process, errors)

    def send(self, request: dict[str, Any]) -> None:
        """Send it its request; one that is gone has a reason that `_reason` finds."""
        assert self.process.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode())
            self.process.stdin.close()

    def kill(self) -> None:
        """Kill its process group: kernels may be compiling in processes below it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill it where it runs, and close its files."""
        if self.process.poll() is None:
            self.kill()
            self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            if file is not None:
                with suppress(OSError):
                    file.close()

    def last_line(self) -> str:
        """Return the last line of its standard error, after a colon; nothing where there is none."""
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 2000))
        text = self.errors.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""


def _ask(request: dict[str, Any], limit: float | None, children: list[_Child]) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of rank 0; all processes are killed when the reader stops, for one by Ctrl-C."""
    try:
        with _watched(children, limit) as killed:
            for child in children:
                child.send(request)
            first = children[0].process
            assert first.stdout is not None  # noqa: S101 - it is a pipe
            yield from (json.loads(line) for line in first.stdout if line.endswith(b"\n"))
            code = first.wait()
            if code and not killed:  # another rank may be about to write why
                until = time.monotonic() + _OTHERS_GRACE
                while any(child.process.poll() is None for child in children) and time.monotonic() < until:
                    time.sleep(_POLL / 10)
                raise _reason(children)
    finally:
        for child in children:
            child.end()
    if killed:
        raise killed[0]


def _start(world: int) -> list[_Child]:
    """Start so many processes, with torchrun's variables where there are several."""
    if world == 1:
        return [_Child.start(_COMMAND)]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    variables = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        _Child.start(_COMMAND, {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


@contextmanager
def _watched(children: list[_Child], limit: float | None) -> Iterator[list[_ChildError]]:
    """Kill the processes at the limit, or when rank 0 goes on waiting for another one that has failed.

    Yields:
        The reason why they were killed; empty as long as they were not.
    """
    killed: list[_ChildError] = []
    done, began = threading.Event(), time.monotonic()
    several = len(children) > 1

    def watch() -> None:
        lost: float | None = None
        while not done.wait(_POLL if several else limit):
            now = time.monotonic()
            if lost is None and any(child.process.poll() for child in children[1:]):
                lost = now
            if limit is not None and now - began >= limit:
                killed.append(_ChildError(f"it did not end within {limit:.0f} s"))
            elif lost is not None and now - lost >= _OTHERS_GRACE:
                killed.append(_reason(children))
            if killed:
                for child in children:
                    child.kill()
                return

    if limit is not None or several:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield killed
    finally:
        done.set()


def _reason(children: list[_Child]) -> _ChildError:
    """Return why there is no answer: a row of another rank, else how the first process failed."""
    for child in children[1:]:
        lines = child.process.stdout
        if child.process.poll() is not None and lines is not None and (line := lines.readline()):
            row = _row(json.loads(line))  # another rank has a row only for what it could not do
            return _ChildError(row.reason or "", row.status)
    ended = [(rank, code) for rank, child in enumerate(children) if (code := child.process.poll())]
    rank, code = min(ended, key=lambda each: each[1])  # killed by a signal, before what that entailed
    words = children[rank].last_line()
    if code == -signal.SIGKILL:
        how = "its process was killed: most likely by the system, for lack of memory"
    elif code < 0:
        how = f"its process died of {signal.Signals(-code).name}{words}"
    else:
        how = f"its process ended with exit code {code}{words}"
    return _ChildError(f"rank {rank}: {how}" if len(children) > 1 else how)


def _row(content: dict[str, Any]) -> Row:
    fields = {key: value for key, value in content.items() if key not in ("format", "model")}
    return Row(model=Model(**content["model"]), **fields)
