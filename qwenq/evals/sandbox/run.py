"""Find a sandbox that works on this machine, and run programs in it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from qwenq.errors import QwenqError, UnsupportedError
from qwenq.evals.sandbox import namespaces
from qwenq.evals.sandbox.inside.confine import filterable

Reason = Literal["passed", "failed", "raised", "timeout", "memory", "died"]


@dataclass(frozen=True)
class Program:
    """A solution and its tests.

    For HumanEval: ``solution`` = prompt + completion, ``entry_points`` = (entry_point,), ``prelude`` = prompt
    (its helpers are used by some tests; its last function has only a docstring as yet), ``tests`` = test +
    ``"\\ncheck(entry_point)"``. One after the other they are the program that openai/human-eval runs.
    """

    id: str  # unique in a run
    solution: str  # source that the model wrote, whole
    entry_points: tuple[str, ...]  # functions of the solution that the tests call
    tests: str  # trusted source; passes by reaching its end
    prelude: str = ""  # trusted source run before the tests, beside them, not beside the solution


@dataclass(frozen=True)
class Limits:
    """Limits of one process in the sandbox."""

    # of processor time, rounded up, so that load on the machine changes no verdict. By the clock a program
    # may take ``WALL`` times as long, for those that sleep
    seconds: float = 3.0
    memory: int = 1 << 30  # bytes of address space
    scratch: int = 16 << 20  # bytes of its /tmp, and of any file
    open_files: int = 64  # descriptors

    WALL = 4

    @property
    def wall(self) -> float:
        """Return the seconds by the clock, from the moment both processes are ready."""
        return self.seconds * self.WALL


@dataclass(frozen=True)
class Outcome:
    """Outcome of a program."""

    passed: bool  # the tests ran to their end
    # ``passed``; ``failed``: an assertion of the tests; ``raised``: another exception, in the solution or
    # because of what it returned; ``timeout``; ``memory``; ``died``: its process ended
    reason: Reason
    detail: str = ""  # one line to read; the solution influences it, so it is never parsed


# Find a sandbox that works here: each is tried on a program before it is used.


_INSIDE = "qwenq/evals/sandbox/inside"
_PACKAGE_ROOT = Path(__file__).parents[3]
_NOBODY = "65534"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_HINT = (
    "apt-get install bubblewrap (in a container also: allow user namespaces, such as docker run "
    "--security-opt seccomp=unconfined); or --unsafe-code: the programs then run as you, on your files"
)

Wrap = Callable[[list[str], Limits], list[str]]


@dataclass(frozen=True)
class Sandbox:
    """A way to start a confined process."""

    implementation: str  # its name and version, for the records
    wrap: Wrap  # a Python command line → the command that runs it confined
    package_root: str  # the process's path to ``qwenq/evals/sandbox/inside``

    def command(self, role: str, limits: Limits, *more: str) -> list[str]:
        """Return the command of the process in this role (``inside.__main__``)."""
        arguments = ["-m", _INSIDE.replace("/", "."), role, json.dumps(asdict(limits)), *more]
        return self.wrap([*_python(), *arguments], limits)

    @property
    def environment(self) -> dict[str, str]:
        """Return the process's whole environment, with a fixed hash seed for the same verdict each time."""
        return {"PYTHONPATH": self.package_root, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}


def find_sandbox(unsafe: bool = False) -> Sandbox:
    """Return the best sandbox that works here: bubblewrap, else Linux namespaces.

    ``unsafe`` (``--unsafe-code``) is no sandbox, but limits and the system-call filter.
    """
    if unsafe:
        kept = "limits and system-call filter" if filterable() else "limits"
        return Sandbox(f"none (--unsafe-code; {kept} only)", lambda c, _: c, str(_PACKAGE_ROOT))
    reasons = []
    for name, make in (("bubblewrap", _bubblewrap), ("Linux namespaces", _namespaces)):
        try:
            if not filterable():
                raise UnsupportedError(f"no system-call filter for {sys.platform} on {os.uname().machine}")
            sandbox = make()
            _try(sandbox)
        except QwenqError as error:
            reasons.append(f"{name}: {error.what}")
        else:
            return sandbox
    what = "no sandbox works here for the code that a model wrote"
    raise UnsupportedError(what, where="; ".join(reasons), hint=_HINT)


def _bubblewrap() -> Sandbox:
    """Return bubblewrap as a sandbox, https://github.com/containers/bubblewrap, from 0.7 (``--size``)."""
    program = shutil.which("bwrap")
    if program is None:
        raise UnsupportedError("not installed")
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False
    ).stdout.strip()

    def wrap(command: list[str], limits: Limits) -> list[str]:
        options = ["--unshare-all", "--unshare-user", "--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL"]
        options += ["--die-with-parent", "--new-session", "--size", str(limits.scratch), "--tmpfs", "/tmp"]  # noqa: S108 - of the sandbox
        for source, target in _visible():
            options += ["--ro-bind", source, target]
        for target, link in _links():
            options += ["--symlink", target, link]
        for device in _DEVICES:
            options += ["--dev-bind", device, device]
        return [program, *options, "--remount-ro", "/", "--chdir", "/tmp", "--", *command]  # noqa: S108

    return Sandbox(version or "bubblewrap", wrap, "/inside")


def _namespaces() -> Sandbox:
    def wrap(command: list[str], limits: Limits) -> list[str]:
        plan = {"visible": _visible(), "links": _links(), "devices": _DEVICES, "scratch": limits.scratch}
        return [*_python(), namespaces.__file__, json.dumps(plan), *command]

    return Sandbox(f"Linux namespaces ({os.uname().release})", wrap, "/inside")


def _python() -> list[str]:
    """Return the interpreter itself, not a virtual environment's link to it, whose packages stay outside."""
    return [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-s", "-S", "-B", "-P"]


def _visible() -> list[tuple[str, str]]:
    """Return read-only mounts as (here, there): system libraries, Python, ``inside``."""
    folders = [
        f for f in ("/usr", "/lib", "/lib64", "/lib32") if Path(f).is_dir() and not Path(f).is_symlink()
    ]
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment's
    python = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    python += [str(library) for library in Path(sys.base_prefix, "lib").glob("lib*.so*")]
    wanted = [*folders, _python()[0], *python, "/etc/ld.so.cache"]
    shown: list[str] = []
    for path in wanted:
        if Path(path).exists() and not any(Path(path).is_relative_to(folder) for folder in shown):
            shown.append(path)
    inside = str(_PACKAGE_ROOT / _INSIDE)
    return [*((path, path) for path in shown), (inside, f"/inside/{_INSIDE}")]


def _links() -> list[tuple[str, str]]:
    """Return links at the root, as (target, link), on systems whose /lib is one."""
    roots = (Path(f) for f in ("/lib", "/lib64", "/lib32"))
    return [(str(root.readlink()), str(root)) for root in roots if root.is_symlink()]


def _try(sandbox: Sandbox) -> None:
    """Refuse a sandbox in which a program finds files or processes outside."""
    home = _home()
    source = (
        "import os\n"
        "def look():\n"
        "    open('/tmp/written', 'w').close()\n"
        f"    ours = os.path.exists({home!r}) and set(os.listdir({home!r}))\n"
        "    return os.listdir('/tmp'), os.access('/', os.W_OK), os.path.exists('/proc/1'), ours\n"
    )
    tests = (
        "found, writable, processes, ours = look()\n"
        "assert found == ['written'], 'its /tmp is not its own'\n"
        "assert not writable, 'it can write to /'\n"
        "assert not processes, 'it sees processes'\n"
        f"assert not ours or ours <= {_parts_of_python(home)!r}, 'it sees the home folder'\n"
    )
    program = Program("probe", source, ("look",), tests)
    (outcome,) = run_programs([program], sandbox=sandbox, jobs=1)
    if not outcome.passed:
        raise UnsupportedError(f"it does not confine: {outcome.detail}")


def _home() -> str:
    """Return the user's home folder; empty where there is none, as for a bare user number in a container."""
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry among the users
        return ""
    system = [Path(shown) for _, shown in _visible()]
    own = home.is_absolute() and home != Path("/") and not any(home.is_relative_to(path) for path in system)
    return str(home) if own else ""


def _parts_of_python(home: str) -> set[str]:
    """Return names in the home folder that lead to an interpreter installed there."""
    shown = [Path(path) for path, _ in _visible() if home]
    return {
        path.relative_to(home).parts[0] for path in shown if path.is_relative_to(home) and str(path) != home
    }


# Run programs, several at a time.


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
    """Run each program in two sandboxes, the solution's and the tests'; return outcomes in their order.

    Args:
        jobs: programs at a time; None: one a core.
        timeout: seconds of processor time for each side of a program (``Limits.seconds``).
        on_done: called in the calling thread as each ends, in the order of ending.
    """
    limits, stop = replace(Limits(), seconds=timeout), threading.Event()
    outcomes: dict[int, Outcome] = {}
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    with ThreadPoolExecutor(jobs or cores, "sandbox") as pool:
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


def _run(program: Program, sandbox: Sandbox, limits: Limits, stop: threading.Event) -> Outcome:
    """Run one program: start both sides, wait for the verdict, end both."""
    with tempfile.TemporaryFile() as job, tempfile.TemporaryFile() as complaints, ExitStack() as stack:
        job.write(json.dumps(asdict(program)).encode())
        job.seek(0)
        solution, tests = _start(sandbox, limits, job, complaints, stack)
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
            reason = cast(Reason, verdict["reason"] if verdict["reason"] in get_args(Reason) else "failed")
            return Outcome(verdict["passed"] is True, reason, " ".join(str(verdict["detail"]).split())[:500])
        return _without_verdict(solution, tests, verdict, time.monotonic() - began, limits)


def _start(
    sandbox: Sandbox, limits: Limits, job: IO[bytes], complaints: IO[bytes], stack: ExitStack
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Start both processes, which end with the stack; ``complaints`` takes their sandboxes' errors."""
    ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
    common: dict[str, Any] = {"stderr": complaints, "env": sandbox.environment, "cwd": "/"}
    common["start_new_session"] = True  # Ctrl-C is for this process; these are ended by it
    solution = subprocess.Popen(
        sandbox.command("solution", limits),
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        **common,
    )
    stack.callback(_end, solution)
    tests = subprocess.Popen(
        sandbox.command("tests", limits, str(ours.fileno())),
        stdin=job,
        stdout=subprocess.PIPE,
        pass_fds=(ours.fileno(),),
        **common,
    )
    stack.callback(_end, tests)
    ours.close()
    theirs.close()
    return solution, tests


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
    try:
        code: int | None = (solution if verdict else tests).wait(5)
    except subprocess.TimeoutExpired:
        code = None
    if code in (128 + signal.SIGKILL, -signal.SIGKILL) and elapsed >= limits.seconds * 0.9:
        return Outcome(False, "timeout", f"{limits.seconds:g} s of processor time")
    side = "the solution's process" if verdict else "the tests' process"
    return Outcome(False, "died", f"{side} ended early, exit code {code}")
