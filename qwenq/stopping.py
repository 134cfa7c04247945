"""End in order: delay SIGTERM until the step in progress is stored, and let children die with their parent.

A scheduler that takes a machine away sends SIGTERM, and kills some time later: Slurm, torchrun and Kubernetes
wait 30 seconds by default. A layer that takes less is kept, as are answers that are being written. A second
SIGTERM stops at once, and so does Ctrl-C: the user is waiting.

The state is the process's, as signals are. ``qwenq.cli`` installs the handler; in a process without it these
functions do nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

ONE = 1.0
"""Seconds within which a second SIGTERM counts as the first: a scheduler signals all processes of a job, and
torchrun and `qwenq run` pass their own signal on."""


PARENT = "QWENQ_PARENT"
"""Variable with the number of the process that a child ends with."""
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LOOK = 0.5
"""Seconds between two looks for the parent, where the system sends no signal."""


class Terminated(KeyboardInterrupt):
    """SIGTERM takes effect: the step in progress is stored."""


@dataclass
class _State:
    """State of this process.

    Attributes:
        until: the step to finish first.
        came, last: the time of a SIGTERM that is still pending, and of the last one.
        child: whether it ends with another process of qwenq.
    """

    until: str | None = None
    came: float | None = None
    last: float | None = None
    child: bool = False


_state = _State()


@contextmanager
def finishing(until: str) -> Iterator[None]:
    """Make SIGTERM wait for ``stop_here`` or for the end of the block; blocks cannot be nested.

    Args:
        until: what the command waits for, for the message: "this layer is on the disk".

    Raises:
        Terminated: at the end, if it came and nothing else went wrong.
    """
    _state.until = until
    try:
        yield
    finally:
        _state.until = None  # first: a signal between these two lines takes effect at once, and none is lost
        came, _state.came = _state.came, None
    if came is not None:
        raise Terminated


def passed_on() -> bool:
    """Return, for the handler, whether this SIGTERM repeats the last one, which is being handled.

    Also where the last one stopped the command at once: a repetition must not interrupt its end.
    """
    return _state.last is not None and time.monotonic() - _state.last < ONE


def note() -> str | None:
    """Record, for the handler, that SIGTERM came; return what is finished first, None to stop at once."""
    _state.last = time.monotonic()
    if _state.until is None or _state.came is not None:
        return None
    _state.came = _state.last
    return _state.until


def asked() -> bool:
    """Return whether a SIGTERM is pending: nothing new should begin."""
    return _state.came is not None


def came() -> bool:
    """Return whether SIGTERM has come at all: a KeyboardInterrupt is then a stop."""
    return _state.last is not None


def stop_here() -> None:
    """Stop here if SIGTERM is pending: everything is stored.

    Raises:
        Terminated: it is.
    """
    if asked():
        raise Terminated


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interrupt that an error was caused by, or None.

    Code that is interrupted may fail while it unwinds: torch's device modes, popped twice, raise a
    RuntimeError in place of the interrupt.

    Returns:
        A new interrupt of the same kind, to be raised from ``error``.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return type(found)()
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def with_parent(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a child that calls ``die_with_parent`` at its start."""
    return {**(os.environ if variables is None else variables), PARENT: str(os.getpid())}


def die_with_parent() -> None:
    """Let this process be killed when the parent that started it ``with_parent`` ends, be it by kill -9.

    Linux sends the signal; elsewhere a thread looks for the parent.
    """
    named = os.environ.pop(PARENT, None)  # not for the children of this one
    if named is None:
        return
    parent = int(named)
    _state.child = True
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        _die_without(parent)  # it may have ended before
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def is_child() -> bool:
    """Return whether another process of qwenq has started this one, such as `qwenq run` its steps."""
    return _state.child


def _watch(parent: int) -> None:
    while True:
        _die_without(parent)
        time.sleep(_LOOK)


def _die_without(parent: int) -> None:
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
