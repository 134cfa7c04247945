"""SIGTERM in the middle of what should become whole: noted, and obeyed where nothing is half done.

A scheduler that takes a machine away sends SIGTERM, and kills some time later: Slurm and torchrun wait 30
seconds unless told otherwise, Kubernetes as well. A layer that takes less is kept, as are answers that are
being written. A second SIGTERM stops at once. Ctrl-C always does: whoever presses it is waiting.

A signal is the whole process's, and so is what is known of it here. Nothing is installed by this module:
``qwenq.cli`` has the handler, and in a process without it nothing is ever noted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ONE = 1.0
"""Seconds within which a second SIGTERM is the first one again: a scheduler tells all processes of a job, and
torchrun or `qwenq run` passes on what it was told."""


class Terminated(KeyboardInterrupt):
    """SIGTERM is obeyed: what was in progress is stored."""


@dataclass
class _State:
    """What is being finished, when the SIGTERM came that is still to be obeyed, and when the last one did."""

    until: str | None = None
    came: float | None = None
    last: float | None = None


_state = _State()


@contextmanager
def finishing(until: str) -> Iterator[None]:
    """Within it, SIGTERM waits for ``stop_here``, or for the end. It cannot be nested.

    Args:
        until: when the command will stop: "this layer is on the disk".

    Raises:
        Terminated: at the end, if it came and nothing else went wrong.
    """
    _state.until = until
    try:
        yield
    finally:
        _state.until = None  # first: a signal between these two lines is obeyed at once, and none is lost
        came, _state.came = _state.came, None
    if came is not None:
        raise Terminated


def passed_on() -> bool:
    """For the handler, before ``note``: whether this SIGTERM is the last one again, which has been seen to.

    Of one that stopped the command at once, too: it must not break into how the command ends.
    """
    return _state.last is not None and time.monotonic() - _state.last < ONE


def note() -> str | None:
    """For the handler: SIGTERM has come. What is finished first; None: nothing, stop at once."""
    _state.last = time.monotonic()
    if _state.until is None or _state.came is not None:
        return None
    _state.came = _state.last
    return _state.until


def asked() -> bool:
    """Whether SIGTERM came and is still to be obeyed: nothing new should be begun."""
    return _state.came is not None


def came() -> bool:
    """Whether SIGTERM has come, obeyed or not: what looks like Ctrl-C is then a stop."""
    return _state.last is not None


def stop_here() -> None:
    """A place where nothing is half done.

    Raises:
        Terminated: SIGTERM has come.
    """
    if asked():
        raise Terminated


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """The stop that an error came out of, if it did: the error is then nobody's fault, and no reason.

    What a stop breaks into may fail while it is being left: torch's device modes, popped twice, raise a
    RuntimeError in the place of the interrupt.

    Returns:
        A new one of the same kind, to be raised from ``error``; None: no stop is behind it.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return type(found)()
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None
