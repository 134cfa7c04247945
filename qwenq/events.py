"""Report progress: four kinds of event, and one function that receives them.

Every long function of qwenq takes ``listener``: a function of one event. The default, ``silent``, shows
nothing. What a step yields on its way (a layer, a row, a verdict) travels in ``Advance.result``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """The start of a step."""

    step: str  # its name, for people
    total: int | None = None  # number of units; None where the first ``Advance`` tells it
    unit: str = "steps"  # plural name of what is counted
    done: int = 0  # units that are done already, from an earlier run
    seconds: float | None = None  # expected duration; None where there is no estimate
    limit: float | None = None  # seconds that the step may take; None without a budget


@dataclass(frozen=True)
class Advance:
    """Progress within the step that started last."""

    step: str  # its name
    done: int | None = None  # units done so far; None where only ``result`` is new
    total: int | None = None  # number of units, where it is known
    # what is new: ``gptq``'s LayerDone, a Row, the verdict on an item (True, False, or None where it is still
    # to come), or None
    result: object = None


@dataclass(frozen=True)
class Notice:
    """A choice that was made and why, or something else that the user has to know."""

    text: str


@dataclass(frozen=True)
class Finish:
    """The end of a step."""

    step: str


Event = Start | Advance | Notice | Finish
Listener = Callable[[Event], None]
Update = Callable[[int, int], None]
"""Receives (units done, units in all) within a step."""


def silent(event: Event) -> None:
    """Show nothing."""


def notify(listener: Listener, lines: Iterable[str]) -> None:
    """Report lines as notices, each of them once."""
    for line in dict.fromkeys(lines):
        listener(Notice(line))


def rough_time(seconds: float) -> str:
    """Return ``85 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def counted(listener: Listener, step: str, unit: str = "steps") -> Iterator[Update]:
    """Report a step as a function counts it: yield a function of (done, total)."""
    listener(Start(step, unit=unit))
    yield lambda done, total: listener(Advance(step, done, total))
    listener(Finish(step))
