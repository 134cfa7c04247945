"""Run programs, several at a time."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import IO, Any, cast, get_args

from qwenq.errors import QwenqError
from qwenq.evals.sandbox.find import Sandbox
from qwenq.evals.sandbox.programs import Limits, Outcome, Program, Reason

_START_SECONDS = 60.0
_TICK = 0.2
_VERDICT_BYTES = 1 << 16


def run_programs(
    programs: Sequence[Program],
    *,
    sandbox: Sandbox,
    jobs: int | None = None,
    timeout: float = 3.0,
    on_done: Callable[[Program, Outcome], None] | None = None,
) -> list[Outcome]:
    """Run each program in two sandboxes: the solution's and the tests'.

    Args:
        jobs: programs at a time; None: one a core.
        timeout: seconds of processor time for each side of a program (``Limits.seconds``).
        on_done: called in the calling thread as each ends, in the order of ending.

    Returns:
        Outcomes, in the order of the programs.

    Raises:
        QwenqError: the sandbox itself did not start.
    """
    limits, stop = replace(Limits(), seconds=timeout), threading.Event()
    outcomes: dict[int, Outcome] = {}
    with ThreadPoolExecutor(jobs or _cores(), "sandbox") as pool:
        futures = {pool.submit(_run, p, sandbox, limits, stop): i for i, p in enumerate(programs)}
        try:
            for future in as_completed(futures):
                number = futures[future]
                outcomes[number] = future.result()
                if on_done:
                    on_done(programs[number], outcomes[number])
        except BaseException:  # Ctrl-C too: nothing may run on
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [outcomes[number] for number in range(len(programs))]


def _cores() -> int:
    """Return the number of cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def _run(program: Program, sandbox: Sandbox, limits: Limits, stop: threading.Event) -> Outcome:
    """Run one program: start both sides, wait for the verdict, end both."""
    with ExitStack() as stack:
        solution, tests, complaints = _start(program, sandbox, limits, stack)
        lines = _Lines(cast(IO[bytes], tests.stdout), stop)
        if lines.next(_START_SECONDS) is None:
            complaints.seek(0)
            said = complaints.read(2000).decode(errors="replace").strip() or "it did not start in time"
            what = f"the sandbox did not start: {said.splitlines()[-1]}"
            raise QwenqError(what, where=sandbox.implementation, hint="qwenq doctor says what is missing")
        began = time.monotonic()
        verdict = lines.next(limits.wall)
        if stop.is_set():
            return Outcome(False, "died", "interrupted")
        if verdict is not None and verdict.get("reason") != "died":
            return _outcome(verdict)
        return _without_verdict(solution, tests, verdict, time.monotonic() - began, limits)


def _start(
    program: Program, sandbox: Sandbox, limits: Limits, stack: ExitStack
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes], IO[bytes]]:
    """Start both processes, which end with the stack; return them and the file of their sandboxes' errors."""
    ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
    complaints = stack.enter_context(_file())
    job = stack.enter_context(_file())
    content = {"solution": program.solution, "prelude": program.prelude, "tests": program.tests}
    job.write(json.dumps({**content, "entry_points": program.entry_points}).encode())
    job.seek(0)
    bounds = json.dumps(limits.to_json())
    common: dict[str, Any] = {"stderr": complaints, "env": sandbox.environment, "cwd": "/"}
    common["start_new_session"] = True  # Ctrl-C is for this process; these are ended by it
    solution = subprocess.Popen(
        sandbox.command("solution", bounds, limits),
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        **common,
    )
    stack.callback(_end, solution)
    tests = subprocess.Popen(
        sandbox.command("tests", bounds, limits, str(ours.fileno())),
        stdin=job,
        stdout=subprocess.PIPE,
        pass_fds=(ours.fileno(),),
        **common,
    )
    stack.callback(_end, tests)
    ours.close()
    theirs.close()
    return solution, tests, complaints


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; what it started in a process namespace goes with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


class _Lines:
    """JSON lines from the tests' process, with a deadline and a bound on their size."""

    def __init__(self, stream: IO[bytes], stop: threading.Event) -> None:
        self._number, self._stop, self._read = stream.fileno(), stop, b""
        self._poll = select.poll()  # not select.select: a process may have a thousand files open
        self._poll.register(self._number, select.POLLIN)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return the next line; None at the end, the deadline, or the bound."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or self._stop.is_set() or len(self._read) > _VERDICT_BYTES:
                return None
            if self._poll.poll(1000 * min(left, _TICK)):
                part = os.read(self._number, _VERDICT_BYTES)
                if not part:
                    return None
                self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return cast(dict[str, Any], json.loads(line))


def _outcome(verdict: dict[str, Any]) -> Outcome:
    """Return the outcome that the tests' process wrote."""
    passed, reason = verdict["passed"] is True, verdict["reason"]
    known = cast(Reason, reason if reason in get_args(Reason) else "failed")
    return Outcome(passed, known, " ".join(str(verdict["detail"]).split())[:500])


def _without_verdict(
    solution: subprocess.Popen[bytes],
    tests: subprocess.Popen[bytes],
    verdict: dict[str, Any] | None,
    elapsed: float,
    limits: Limits,
) -> Outcome:
    """Return the outcome without a verdict: out of time, or a process ended early."""
    if verdict is None and elapsed >= limits.wall:
        return Outcome(False, "timeout", f"{limits.wall:g} s by the clock")
    code = _code(solution if verdict else tests)
    if code in (128 + signal.SIGKILL, -signal.SIGKILL) and elapsed >= limits.seconds * 0.9:
        return Outcome(False, "timeout", f"{limits.seconds:g} s of processor time")
    side = "the solution's process" if verdict else "the tests' process"
    return Outcome(False, "died", f"{side} ended early, exit code {code}")


def _code(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        return None
