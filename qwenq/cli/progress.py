"""Show how far a long step is: bars on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import typer

from qwenq.cli.printing import bar_on, note, percent, say, to_standard_output
from qwenq.errors import visible
from qwenq.events import Advance, Event, Finish, Listener, Notice, Start, Update, rich_bar, rough_time
from qwenq.results import Row
from qwenq.storage import readable_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

    from qwenq.gptq.pipeline import LayerDone
    from qwenq.profiling.planning import PlannedSweep
    from qwenq.quantization import Quantised

_PLAIN_STEPS = 10
_PLAIN_SECONDS = 2.0  # quick steps are not worth a line
_EVAL_SECONDS = 10.0  # between two plain lines of an evaluation


@contextmanager
def show_progress(
    label: str, unit: str = "tokens", *, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total); nothing is shown before its first call.

    Args:
        label: the step, such as "writing text".
        unit: what is counted; bytes are shown as MB and GB.
        quiet: show nothing.
    """
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _live(label, unit) as update:
            yield update
    else:
        yield _plain(label, unit)


@contextmanager
def show_events(on_notice: Callable[[str], None], *, quiet: bool = False) -> Iterator[Listener]:
    """Yield a listener that shows each step as ``show_progress`` does; ``on_notice`` receives the notices."""
    with ExitStack() as stack:
        update: Update = lambda done, total: None  # noqa: E731

        def listen(event: Event) -> None:
            nonlocal update
            match event:
                case Notice(text):
                    on_notice(text)
                case Start(step, unit=unit):
                    stack.close()
                    update = stack.enter_context(show_progress(step, unit, quiet=quiet))
                case Advance(done=int() as done, total=int() as total):
                    update(done, total)
                case Finish():
                    stack.close()

        yield listen


@contextmanager
def with_details(listener: Listener, verbose: bool) -> Iterator[Listener]:
    """Yield the listener; with ``--verbose`` one that also prints versions, times and modules' errors."""
    if not verbose:
        yield listener
        return
    from qwenq.environment import versions

    running: list[tuple[str, float]] = []

    def end() -> None:
        for step, began in running:
            say(f"{step}: {time.monotonic() - began:.1f} s")
        running.clear()

    def listen(event: Event) -> None:
        if isinstance(event, Start | Finish):
            end()
        if isinstance(event, Start):
            running.append((event.step, time.monotonic()))
        listener(event)
        if isinstance(event, Advance) and isinstance(modules := getattr(event.result, "modules", None), dict):
            errors = (f"{name} {percent(stats.error)}" for name, stats in modules.items())
            say(f"    {', '.join(errors)}", indent="    ")

    say(", ".join(f"{name} {number}" for name, number in versions().items()))
    try:
        yield listen
    finally:
        end()


@contextmanager
def _live(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    from rich import progress as rich_progress

    counts: tuple[rich_progress.ProgressColumn, ...]
    if unit == "bytes":
        counts = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
    else:
        counts = (rich_progress.MofNCompleteColumn(), rich_progress.TextColumn(unit))
    with _bar(*counts, rich_progress.TimeRemainingColumn()) as bar, bar_on(bar.console):
        task = bar.add_task(label, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _bar(*columns: ProgressColumn, stderr: bool = True) -> Bar:
    from rich.console import Console

    return rich_bar(Console(stderr=stderr), *columns)


def _plain(label: str, unit: str) -> Callable[[int, int], None]:
    started = time.monotonic()
    shown = 0

    def update(done: int, total: int) -> None:
        nonlocal shown
        step = _PLAIN_STEPS * done // max(total, 1)
        seconds = time.monotonic() - started
        if step > shown and seconds > _PLAIN_SECONDS:
            shown = step
            if unit == "bytes":
                counts = f"{readable_bytes(done)} of {readable_bytes(total)}"
            else:
                counts = f"{done:,} of {total:,} {unit}"
            typer.echo(f"{label}: {counts}, {seconds:.0f} s", err=True)

    return update


class EvalProgress:
    """A listener that shows an evaluation on stderr: items, share of correct answers, time left."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stack = ExitStack()
        self._bar: Bar | None = None
        self._task: Any = None
        self._left = _TimeLeft()
        self._begin("", 0, 0)

    def __enter__(self) -> EvalProgress:
        if sys.stderr.isatty() and not self._quiet:
            self._bar = self._stack.enter_context(_eval_bar())
            self._stack.enter_context(bar_on(self._bar.console))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __call__(self, event: Event) -> None:
        """Show an event: a task or its programs start, an item is judged, a notice."""
        match event:
            case Start(step, total, unit, done):
                self._clear()
                self._begin(step, total or 0, done)
                if self._bar is None and unit == "items" and not self._quiet:
                    known = f", {done:,} answered earlier" if done else ""
                    items = "1 item" if total == 1 else f"{total:,} items"
                    typer.echo(f"{step}: {items}{known}", err=True)
            case Advance(result=None | bool() as correct):
                self._step(correct)
            case Notice(text):
                note(text)
            case Finish():
                self._clear()

    def _clear(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _begin(self, label: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._known = label, total, done, done
        self._correct = self._verdicts = 0
        self._since = self._shown = time.monotonic()
        if self._bar is not None:
            self._left = _TimeLeft()
            self._task = self._bar.add_task(label, total=total, completed=done, accuracy="", left=self._left)

    def _step(self, correct: bool | None) -> None:
        self._done += 1
        self._verdicts += correct is not None
        self._correct += bool(correct)
        newly = " of the new answers" if self._known else ""
        share = f"{self._correct / self._verdicts:.1%} correct{newly}" if self._verdicts else ""
        now = time.monotonic()
        left = (now - self._since) / (self._done - self._known) * (self._total - self._done)
        if self._bar is not None and self._task is not None:
            self._left.end = now + left
            self._bar.update(self._task, completed=self._done, accuracy=share)
        elif not self._quiet and (now - self._shown >= _EVAL_SECONDS or self._done == self._total):
            self._shown = now
            pace = f"{left:.0f} s left" if self._done < self._total else f"{now - self._since:.0f} s"
            parts = [f"{self._done:,} of {self._total:,}", share, pace]
            typer.echo(f"{self._name}: {', '.join(part for part in parts if part)}", err=True)


@dataclass
class _TimeLeft:
    """Time left, formatted anew whenever the bar is drawn, so that it counts down between two answers.

    Attributes:
        end: estimated end by the pace so far; None before the first answer.
    """

    end: float | None = None

    def __str__(self) -> str:
        if self.end is None:
            return "-:--:--"
        minutes, seconds = divmod(max(0, round(self.end - time.monotonic())), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _eval_bar() -> Bar:
    from rich.progress import MofNCompleteColumn, TextColumn

    left = TextColumn("{task.fields[left]} left", style="progress.remaining")
    return _bar(MofNCompleteColumn(), TextColumn("{task.fields[accuracy]}"), left)


class ProfileProgress:
    """A listener that shows a sweep: a line for each point on stderr, or rows as JSON on stdout."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet, self.points = as_json, quiet or as_json, 0

    def __call__(self, event: Event) -> None:
        """Show an event: a point starts, a row is measured, a notice."""
        match event:
            case Start(step) if not self.quiet:
                share = f", {rough_time(event.limit)} of the budget" if event.limit is not None else ""
                about = f"about {rough_time(event.seconds or 0)}{share}"
                say(f"{event.done + 1} of {event.total}: {step}, {about}")
            case Advance("plan", result=planned):
                sweep = cast("PlannedSweep", planned)
                self.points = len(sweep.points)
                if not self.quiet:
                    show_plan(sweep)
            case Advance(result=Row() as row) if self.as_json:
                with to_standard_output():
                    typer.echo(json.dumps(row.to_json(), ensure_ascii=False))
            case Notice(text):
                note(text)


def show_plan(sweep: PlannedSweep) -> None:
    """Print what will be measured, in which order, and about how long it takes."""
    planned, budget = sweep.points, sweep.budget
    total, load = sum(each.seconds for each in planned), sum(each.load for each in planned)
    count = f"{len(planned)} point{'' if len(planned) == 1 else 's'}"
    limit = f", budget {rough_time(budget)}" if budget is not None else ""
    loading = f" ({rough_time(load)} of it to start and load)"
    say(
        f"plan: {count} on {sweep.device.device}, about {rough_time(total)}{loading}{limit}; "
        f"into {visible(str(sweep.folder))}",
        err=False,
    )
    if budget is not None and sum(each.needed for each in planned) > budget:
        say(
            "  to load and measure each once takes more than the budget: the last points may be skipped",
            err=False,
        )
    elif budget is not None and total > budget:
        say(
            "  more than the budget: fewer repetitions, and generations that do not fit are skipped",
            err=False,
        )
    for each in planned:
        seconds = f"about {rough_time(each.seconds)} ({rough_time(each.load)} to load)"
        estimate = each.too_large or f"{seconds}, {readable_bytes(each.nbytes)}"
        say(f"  {each.point.label}: {estimate}", err=False, indent="    ")


# Show a quantisation: live on a terminal, plain lines in a log, JSON lines for machines.


_UNKNOWN = "-:--"
RESUME_HINT = "finished layers are kept: the same command goes on where it stopped"


@contextmanager
def quantize_listener(*, as_json: bool, quiet: bool = False) -> Iterator[TextListener | JsonListener]:
    """Yield the listener for this output; what it shows live is cleared when it ends."""
    with ExitStack() as stack:
        yield JsonListener() if as_json else TextListener(stack, quiet=quiet)


class TextListener:
    """A listener for people: a bar on a terminal, one line per layer elsewhere."""

    def __init__(self, stack: ExitStack, *, quiet: bool = False) -> None:
        self._stack, self._quiet = stack, quiet
        self._bar: Bar | None = None
        self._task: Any = None
        self._update: Update = lambda done, total: None
        self._fresh: list[float] = []  # seconds of the layers that were not resumed

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Notice(text):
                say(f"· {text}", err=False)
            case Start(step, total, "layers"):
                self._stack.close()
                if sys.stdout.isatty() and not self._quiet:
                    self._bar = self._stack.enter_context(_layer_bar())
                    self._stack.enter_context(bar_on(self._bar.console))
                    self._task = self._bar.add_task(step, total=total, left=_UNKNOWN)
            case Start(step, unit=unit):
                self._stack.close()
                self._bar = None
                self._update = self._stack.enter_context(show_progress(step, unit, quiet=self._quiet))
            case Advance(done=int() as done, total=int() as total, result=None):
                self._update(done, total)
            case Advance(result=layer) if layer is not None and not self._quiet:
                self._layer(cast("LayerDone", layer))

    def _layer(self, done: LayerDone) -> None:
        if not done.resumed:
            self._fresh.append(done.seconds)
        error = f"error on calibration text {percent(done.error)}, round-to-nearest {percent(done.rtn_error)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done.index + 1, left=self._left(done))
            self._bar.console.print(f"  layer {done.index + 1:>3} of {done.total}: {error}", highlight=False)
            return
        how = "resumed" if done.resumed else f"{done.seconds:.1f} s, {self._left(done)} left"
        typer.echo(f"  layer {done.index + 1} of {done.total}: {error}; {how}")

    def interrupted(self) -> None:
        """Show how to go on after Ctrl-C or SIGTERM."""
        self._stack.close()
        typer.echo(f"stopped; {RESUME_HINT}", err=True)

    def finished(self, result: Quantised) -> None:
        """Show the summary."""
        self._stack.close()
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())
        if result.resumed_layers:
            seconds += f" (this run alone: {result.resumed_layers} layers were done before)"
        share = result.weight_bytes / result.base_bytes
        base = readable_bytes(result.base_bytes)
        lines = {
            "checkpoint": _from_here(result.folder),
            "size": f"{readable_bytes(result.weight_bytes)} ({share:.0%} of {base})",
            "time": seconds,
            **(result.check.summary() if result.check else {"check": "not possible with random weights"}),
        }
        typer.echo()
        for name, value in lines.items():
            say(f"{name:<14}{value}", err=False, indent=" " * 14)

    def _left(self, done: LayerDone) -> str:
        if not self._fresh:
            return _UNKNOWN
        left = round(sum(self._fresh) / len(self._fresh) * (done.total - done.index - 1))
        return f"{left // 60}:{left % 60:02d}"


def _from_here(folder: Path) -> str:
    """Return a folder's path, from the current one where it lies in it."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


class JsonListener:
    """A listener for machines: one JSON object per line on stdout, the result last."""

    def __call__(self, event: Event) -> None:
        """Print an event; of the progress within a step, only layers."""
        match event:
            case Notice(text):
                _emit("note", text=text)
            case Start(_, total, "layers"):
                _emit("layers", total=total)
            case Start(step):
                _emit("step", text=step)
            case Advance(result=layer) if layer is not None:
                done = cast("LayerDone", layer)
                _emit(
                    "layer",
                    index=done.index,
                    total=done.total,
                    seconds=round(done.seconds, 3),
                    error=done.error,
                    rtn_error=done.rtn_error,
                    resumed=done.resumed,
                )

    def interrupted(self) -> None:
        """Report Ctrl-C or SIGTERM."""
        _emit("interrupted", text=RESUME_HINT)

    def finished(self, result: Quantised) -> None:
        """Report the result."""
        _emit("result", **result.to_json())


def _emit(event: str, **facts: Any) -> None:
    typer.echo(json.dumps({"event": event, **facts}, ensure_ascii=False))


def _layer_bar() -> Bar:
    from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

    gone = (TextColumn("layers ·"), TimeElapsedColumn(), TextColumn("gone,"))
    # Of layers that were resumed rich's own estimate would take the next ones to be as quick.
    return _bar(MofNCompleteColumn(), *gone, TextColumn("{task.fields[left]} left"), stderr=False)
