"""Progress of a long step: a live bar on a terminal, a few plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import typer

from qwenq.events import Advance, Event, Finish, Listener, Notice, Start, Update

_PLAIN_STEPS = 10
_PLAIN_SECONDS = 2.0  # quick steps are not worth a line
_REMEMBERED = 3600.0  # seconds: rich's half a minute knows no time left where one step takes longer


@contextmanager
def show_progress(label: str, unit: str = "tokens") -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total); nothing is shown before its first call."""
    if sys.stderr.isatty():
        with _live(label, unit) as update:
            yield update
    else:
        yield _plain(label, unit)


@contextmanager
def show_events(say: Callable[[str], None]) -> Iterator[Listener]:
    """Yield a listener that shows each step as ``show_progress`` does; ``say`` receives the notices."""
    with ExitStack() as stack:
        update: Update = lambda done, total: None  # noqa: E731

        def listen(event: Event) -> None:
            nonlocal update
            match event:
                case Notice(text):
                    say(text)
                case Start(step, unit=unit):
                    stack.close()
                    update = stack.enter_context(show_progress(step, unit))
                case Advance(done=int() as done, total=int() as total):
                    update(done, total)
                case Finish():
                    stack.close()

        yield listen


@contextmanager
def _live(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_REMEMBERED) as bar:
        task = bar.add_task(label, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _plain(label: str, unit: str) -> Callable[[int, int], None]:
    started = time.monotonic()
    shown = 0

    def update(done: int, total: int) -> None:
        nonlocal shown
        step = _PLAIN_STEPS * done // max(total, 1)
        seconds = time.monotonic() - started
        if step > shown and seconds > _PLAIN_SECONDS:
            shown = step
            typer.echo(f"{label}: {done:,} of {total:,} {unit}, {seconds:.0f} s", err=True)

    return update
