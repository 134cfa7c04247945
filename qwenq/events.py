"""Report progress: four kinds of event, one function that receives them, and a bar that shows them.

Every long function of qwenq takes ``listener``: a function of one event. The default, ``silent``, shows
nothing. What a step yields on its way (a layer, a row, a verdict) travels in ``Advance.result``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID


@dataclass(frozen=True)
class Start:
    """The start of a step.

    Attributes:
        step: name of the step, for people.
        total: number of units; None where the first ``Advance`` tells it.
        unit: plural name of what is counted.
        done: units that are done already, from an earlier run.
        seconds: expected duration; None where there is no estimate.
        limit: seconds that the step may take; None without a budget.
    """

    step: str
    total: int | None = None
    unit: str = "steps"
    done: int = 0
    seconds: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Advance:
    """Progress within the step that started last.

    Attributes:
        step: its name.
        done: units done so far; None where only ``result`` is new.
        total: number of units, where it is known.
        result: what is new: ``gptq``'s LayerDone, a Row, the verdict on an item (True, False, or None where
            it is still to come), or None.
    """

    step: str
    done: int | None = None
    total: int | None = None
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


def rich_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """Return a bar that is cleared at its end; the columns follow its label."""
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        redirect_stdout=not console.stderr,  # what is piped on while a bar is on standard error stays there
        speed_estimate_period=3600,  # rich's half a minute knows no time left where one step takes longer
    )


@dataclass
class ProgressBar:
    """A listener that shows a bar in a terminal or a Jupyter notebook, and notices as lines.

    Use it as a context manager; the bar goes when it is left. Where neither is there (a log, a pipe) only
    notices are written. Everything goes to stderr in a terminal, into the cell's output in a notebook.
    """

    notices: bool = True
    _bar: Progress | None = field(default=None, init=False, repr=False)
    _task: TaskID | None = field(default=None, init=False, repr=False)
    _done: int = field(default=0, init=False, repr=False)

    def __enter__(self) -> ProgressBar:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_jupyter:
            console.stderr = True
        unit = TextColumn("{task.fields[unit]}", markup=False)
        self._bar = rich_bar(console, MofNCompleteColumn(), unit, TimeRemainingColumn())
        self._bar.disable = not (console.is_terminal or console.is_jupyter)
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __call__(self, event: Event) -> None:
        """Show an event."""
        bar = self._bar
        if bar is None:
            return
        match event:
            case Notice(text):
                if self.notices:
                    bar.console.print(text, soft_wrap=True)
            case Start():
                self._clear(bar)
                self._done = event.done
                self._task = bar.add_task(
                    event.step, total=event.total, completed=event.done, unit=event.unit
                )
            case Advance() if self._task is not None:
                if event.done is not None:
                    self._done = event.done
                bar.update(self._task, completed=self._done)
                if event.total is not None:
                    bar.update(self._task, total=event.total)
            case Finish():
                self._clear(bar)

    def _clear(self, bar: Progress) -> None:
        if self._task is not None:
            bar.remove_task(self._task)
            self._task = None
