"""Stands for ``subprocess.Popen`` where qwenq starts `python -m MODULE`: forks, and torch is there already.

What the module does, its pipes, signals and exit status are the real ones; only the start of Python is saved.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import IO, Any

PIPE = -1
_kept: list[Any] = []


class ForkedPopen:
    """The part of ``Popen`` that is used."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        flag, *argv = command[1:]
        assert (command[0], flag) == (sys.executable, "-m")
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        ours, theirs = pipes(stdin, stdout)
        # As CPython's: a signal that comes meanwhile is not for our handlers in the child.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            become(argv, theirs, stderr, env)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for handle in theirs.values():
            os.close(handle)
        self.stdin = os.fdopen(ours[0], "wb", buffering=0) if 0 in ours else None
        self.stdout = os.fdopen(ours[1], "rb") if 1 in ours else None

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        status = self._ended(0)
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> ForkedPopen:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def pipes(stdin: int | None, stdout: int | None) -> tuple[dict[int, int], dict[int, int]]:
    """The parent's and the child's ends, by the child's number."""
    ours, theirs = {}, {}
    if stdin == PIPE:
        theirs[0], ours[0] = os.pipe()
    if stdout == PIPE:
        ours[1], theirs[1] = os.pipe()
    return ours, theirs


def become(
    argv: Sequence[str], handles: Mapping[int, int], errors: IO[bytes] | None, env: Mapping[str, str] | None
) -> None:
    """The child: as after exec, with other files; never returns."""
    for number, handle in handles.items():
        os.dup2(handle, number)
    if errors is not None:
        os.dup2(errors.fileno(), 2)
    os.closerange(3, 256)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    _kept.extend([sys.stdin, sys.stdout, sys.stderr])  # whoever collects them closes the numbers
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    module, *arguments = argv
    sys.argv = [module, *arguments]
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        code = 1
    sys.stdout.flush()
    os._exit(code or 0)


def install() -> None:
    """Let points and steps be forked from now on."""
    import qwenq.profiling.child
    import qwenq.workflow

    stand_in = SimpleNamespace(Popen=ForkedPopen, PIPE=PIPE)
    qwenq.profiling.child.subprocess = stand_in  # type: ignore[attr-defined]
    qwenq.workflow.subprocess = stand_in  # type: ignore[attr-defined]
