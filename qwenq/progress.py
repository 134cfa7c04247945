"""Show how far a step is: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from textwrap import wrap
from typing import TYPE_CHECKING, Self

from qwenq.events import Advance, Event, Finish, Listener, Notice, Start, silent
from qwenq.storage import readable_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

Progress = bool | Listener | None
"""What functions take as ``progress``: whether steps are shown, or what receives the events."""
_QUICK, _OFTEN = 2.0, 10.0
"""Seconds: steps that end sooner are not worth a plain line; and between two plain lines of a step."""
_live: list[Console] = []
"""Consoles that show a bar now, the last on top."""


@contextmanager
def shown(progress: Progress) -> Iterator[Listener]:
    """Yield the listener that an argument ``progress`` asks for."""
    if callable(progress):
        yield progress
    elif progress:
        with StepListener(lambda text: say(text, err=not _in_notebook())) as listener:
            yield listener
    else:
        yield silent


def wrapped(line: str, indent: str = "  ", *, err: bool = False) -> str:
    """Return a line broken between words, where it goes to a terminal that is narrower.

    ``indent`` is that of the lines that continue it; with ``err`` it goes to standard error.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None or not stream.isatty():
        return line
    width = max(20, shutil.get_terminal_size().columns)
    parts = wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(parts)


def say(line: str, *, err: bool = True, indent: str = "  ") -> None:
    """Print a line, ``wrapped``; on a terminal or in a notebook above the bar if there is one."""
    stream = sys.stderr if err else sys.stdout
    line = wrapped(line, indent, err=err)
    if _live and stream is not None and (stream.isatty() or _live[-1].is_jupyter):
        _live[-1].print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
    else:
        from typer import echo  # what only imports qwenq has no use for it

        echo(line, err=err)


def note(line: str) -> None:
    """Print something that the user has to know, on standard error."""
    say(f"note: {line}")


@dataclass
class _TimeLeft:
    """Time left, formatted anew whenever a bar is drawn, so that it counts down between two items."""

    end: float | None = None  # estimated by the pace so far; None before the first item

    def __str__(self) -> str:
        if self.end is None:
            return "-:--:--"
        return str(timedelta(seconds=max(0, round(self.end - time.monotonic()))))


class StepListener:
    """A listener that shows the running step: on standard error, or in a notebook's cell.

    Of items that are judged it shows the share of correct ones. It is a context manager that clears the bar.
    """

    def __init__(self, on_notice: Callable[[str], None] = note, *, quiet: bool = False) -> None:
        self._on_notice, self._quiet = on_notice, quiet
        self._stack = ExitStack()
        self._bar: Bar | None = None
        self._begin(Start(""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, event: Event) -> None:
        """Show an event: a step starts, goes on or ends; or a notice."""
        match event:
            case Notice(text):
                self._on_notice(text)
            case Start():
                self._begin(event)
            case Advance():
                self._advance(event)
            case Finish():
                self._stack.close()

    def _begin(self, start: Start) -> None:
        self._stack.close()
        self._step, self._total, self._bar, self._left = start, start.total or 0, None, _TimeLeft()
        self._done = start.done
        self._correct = self._verdicts = 0
        self._time_from(start.done)
        self._shown = self._since
        if self._quiet or not start.step:
            return
        if sys.stderr.isatty() or _in_notebook():
            self._bar = self._stack.enter_context(_bar(start.unit))
            _live.append(self._bar.console)
            self._stack.callback(_live.remove, self._bar.console)
            self._task = self._bar.add_task(
                start.step,
                total=start.total,
                completed=start.done,
                visible=start.total is not None,
                what=start.unit,
                left=self._left,
            )
        elif start.unit == "items" and start.total is not None:
            known = f", {start.done:,} answered earlier" if start.done else ""
            items = "1 item" if start.total == 1 else f"{start.total:,} items"
            say(f"{start.step}: {items}{known}")

    def _time_from(self, done: int) -> None:
        """Measure the pace from now on: what is done so far is known from earlier and took no time."""
        self._known, self._since = done, time.monotonic()

    def _advance(self, event: Advance) -> None:
        self._done = self._done + 1 if event.done is None else event.done
        self._total = event.total or self._total
        if isinstance(event.result, bool):
            self._verdicts += 1
            self._correct += event.result
        now, fresh = time.monotonic(), self._done - self._known
        if fresh > 0:
            self._left.end = now + (now - self._since) / fresh * (self._total - self._done)
        if not self._quiet:
            self._show(event, now)

    def _show(self, event: Advance, now: float) -> None:
        newly = " of the new answers" if self._known else ""
        share = f"{self._correct / self._verdicts:.1%} correct{newly}" if self._verdicts else ""
        if self._bar is not None:
            what = share or self._step.unit
            self._bar.update(self._task, completed=self._done, total=self._total, visible=True, what=what)
            return
        over, seconds = self._done == self._total, now - self._since
        if now - self._shown >= _OFTEN or (over and (self._verdicts or seconds > _QUICK)):
            self._shown = now
            left = seconds if over or self._left.end is None else self._left.end - now
            pace = f"{left:.0f} s{'' if over else ' left'}"
            if self._step.unit == "bytes":
                counts = f"{readable_bytes(self._done)} of {readable_bytes(self._total)}"
            else:
                counts = f"{self._done:,} of {self._total:,} {self._step.unit}"
            say(f"{self._step.step}: {', '.join(filter(None, (counts, share, pace)))}")


def _bar(unit: str) -> Bar:
    """Return a bar that is cleared at its end."""
    from rich import progress
    from rich.console import Console

    counts: tuple[ProgressColumn, ...] = (
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[what]}"),
    )
    if unit == "bytes":
        counts = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    console = Console(stderr=not _in_notebook())
    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *counts,
        progress.TextColumn("{task.fields[left]} left", style="progress.remaining"),
        console=console,
        transient=True,
        redirect_stdout=not console.stderr,  # what is piped on while a bar is on standard error stays there
        speed_estimate_period=3600,  # rich's half a minute knows no speed where one piece takes longer
    )


def _in_notebook() -> bool:
    """Return whether output goes into the cell of a notebook."""
    if "IPython" not in sys.modules:  # to load rich takes time
        return False
    from rich.console import Console

    return Console().is_jupyter
