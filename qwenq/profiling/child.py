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
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from qwenq.errors import QwenqError
from qwenq.profiling.spec import Point
from qwenq.results import Model, Row, Status

_COMMAND = [sys.executable, "-m", "qwenq.profiling.worker"]
_GRACE = 120.0
"""Seconds beyond three times its time limit after which a point counts as hung."""
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

    Raises:
        QwenqError: the process failed.
    """
    began = time.monotonic()
    for content in _ask({"probe": device}, None):
        if "error" not in content:
            content["start_seconds"] = time.monotonic() - began - content.pop("worked_seconds")
        return content
    raise QwenqError(
        "the process that examines the device failed", where=device, hint="run again with --debug"
    )


def measure_in_child(point: Point, seconds: float | None) -> Iterator[Row]:
    """Yield a point's rows as they are measured; every metric has one, however the processes end.

    Args:
        point: ``point.tp`` processes hold its model together; rank 0 measures.
        seconds: time limit of the point; None: no limit.
    """
    missing = dict.fromkeys(point.metrics)
    limit = None if seconds is None else 3 * seconds + _GRACE
    try:
        for content in _ask({"point": point.to_json(), "seconds": seconds}, limit, point.tp):
            row = _row(content)
            missing.pop(row.metric, None)
            yield row
    except _ChildError as error:
        again = error.status == "failed"
        yield from point.without(error.status, error.what, list(missing), again=again)


def _ask(request: dict[str, Any], limit: float | None, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of rank 0; all processes are killed when the reader stops, for one by Ctrl-C.

    Raises:
        _ChildError: a process failed; names the reason.
    """
    with ExitStack() as files:
        errors: list[IO[bytes]] = [files.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        children = _start(errors)
        try:
            with _watched(children, errors, limit) as killed:
                for child in children:
                    with suppress(BrokenPipeError):
                        assert child.stdin is not None  # noqa: S101 - it is a pipe
                        child.stdin.write(json.dumps({**request, "parent": os.getpid()}).encode())
                        child.stdin.close()
                lines = children[0].stdout
                assert lines is not None  # noqa: S101 - it is a pipe
                yield from (json.loads(line) for line in lines if line.endswith(b"\n"))
                code = children[0].wait()
                if code and not killed:  # another rank may be about to write why
                    _await_exit(children[1:])
                    raise _reason(children, errors)
        finally:
            for child in children:
                _end(child)
        if killed:
            raise killed[0]


def _start(errors: list[IO[bytes]]) -> list[subprocess.Popen[bytes]]:
    """Start a process for each of these files, with torchrun's variables where there are several."""
    world, variables = len(errors), dict(os.environ)
    if world > 1:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        variables |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the child.
        subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            env=variables if world == 1 else {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, stderr in enumerate(errors)
    ]


@contextmanager
def _watched(
    children: list[subprocess.Popen[bytes]], errors: list[IO[bytes]], limit: float | None
) -> Iterator[list[_ChildError]]:
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
            if lost is None and any(child.poll() for child in children[1:]):
                lost = now
            if limit is not None and now - began >= limit:
                killed.append(_ChildError(f"it did not end within {limit:.0f} s"))
            elif lost is not None and now - lost >= _OTHERS_GRACE:
                killed.append(_reason(children, errors))
            if killed:
                for child in children:
                    _kill(child)
                return

    if limit is not None or several:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield killed
    finally:
        done.set()


def _await_exit(children: list[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _OTHERS_GRACE
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(_POLL / 10)


def _reason(children: list[subprocess.Popen[bytes]], errors: list[IO[bytes]]) -> _ChildError:
    """Return why there is no answer: a row of another rank, else how the first process failed."""
    for child in children[1:]:
        if child.poll() is not None and child.stdout is not None and (line := child.stdout.readline()):
            row = _row(json.loads(line))  # another rank has a row only for what it could not do
            return _ChildError(row.reason or "", row.status)
    ended = [(rank, code) for rank, child in enumerate(children) if (code := child.poll())]
    rank, code = min(ended, key=lambda each: each[1])  # killed by a signal, before what that entailed
    words = _last_line(errors[rank])
    if code == -signal.SIGKILL:
        how = "its process was killed: most likely by the system, for lack of memory"
    elif code < 0:
        how = f"its process died of {signal.Signals(-code).name}{words}"
    else:
        how = f"its process ended with exit code {code}{words}"
    return _ChildError(f"rank {rank}: {how}" if len(children) > 1 else how)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 2000))
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        _kill(child)
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child's process group: kernels may be compiling in processes below it."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _row(content: dict[str, Any]) -> Row:
    fields = {key: value for key, value in content.items() if key not in ("format", "model")}
    return Row(model=Model(**content["model"]), **fields)
