"""Show how far a long step is: bars on a terminal, plain lines elsewhere, JSON lines for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import typer

from qwenq.cli.printing import bar_on, note, percent, say
from qwenq.errors import visible
from qwenq.events import Advance, Event, Finish, Listener, Notice, Start, rich_bar, rough_time
from qwenq.results import Row
from qwenq.storage import readable_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

    from qwenq.gptq.pipeline import LayerDone
    from qwenq.profiling.planning import PlannedSweep
    from qwenq.quantization import Quantised

_QUICK, _OFTEN = 2.0, 10.0
"""Seconds: steps that end sooner are not worth a plain line; and between two plain lines of a step."""


@dataclass
class _TimeLeft:
    """Time left, formatted anew whenever a bar is drawn, so that it counts down between two items."""

    end: float | None = None  # estimated by the pace so far; None before the first item

    def __str__(self) -> str:
        if self.end is None:
            return "-:--:--"
        return str(timedelta(seconds=max(0, round(self.end - time.monotonic()))))


class StepListener:
    """A listener that shows the running step on standard error: a bar on a terminal, plain lines elsewhere.

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
        self._done = self._known = start.done  # units that are known from earlier took no time
        self._correct = self._verdicts = 0
        self._since = self._shown = time.monotonic()
        if self._quiet or not start.step:
            return
        if sys.stderr.isatty():
            self._bar = self._stack.enter_context(_bar(start.unit))
            self._stack.enter_context(bar_on(self._bar.console))
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
            typer.echo(f"{start.step}: {items}{known}", err=True)

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
            typer.echo(f"{self._step.step}: {', '.join(filter(None, (counts, share, pace)))}", err=True)


def _bar(unit: str) -> Bar:
    from rich.console import Console
    from rich.progress import DownloadColumn, MofNCompleteColumn, TextColumn, TransferSpeedColumn

    left = TextColumn("{task.fields[left]} left", style="progress.remaining")
    columns: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    if unit == "bytes":
        columns = (DownloadColumn(), TransferSpeedColumn())
    return rich_bar(Console(stderr=True), *columns, left)


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


class ProfileProgress:
    """A listener that shows a sweep: a line for each point on stderr, or rows as JSON on stdout."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet or as_json

    def __call__(self, event: Event) -> None:
        """Show an event: a point starts, a row is measured, a notice."""
        match event:
            case Start(step) if not self.quiet:
                share = f", {rough_time(event.limit)} of the budget" if event.limit is not None else ""
                about = f"about {rough_time(event.seconds or 0)}{share}"
                say(f"{event.done + 1} of {event.total}: {step}, {about}")
            case Advance("plan", result=planned):
                if not self.quiet:
                    show_plan(cast("PlannedSweep", planned))
            case Advance(result=Row() as row) if self.as_json:
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


# Show a quantisation: lines of layers for people, JSON lines for machines.


RESUME_HINT = "finished layers are kept: the same command goes on where it stopped"


def quantize_listener(
    *, as_json: bool, quiet: bool = False
) -> AbstractContextManager[LayerListener | JsonListener]:
    """Return the listener for this output, as a context manager."""
    return nullcontext(JsonListener()) if as_json else LayerListener(quiet=quiet)


class LayerListener(StepListener):
    """A listener for people: steps as ever, and a line for each layer on standard output."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(lambda text: say(f"· {text}", err=False), quiet=quiet)

    def _advance(self, event: Advance) -> None:
        if getattr(event.result, "resumed", False):  # a layer that took next to no time
            self._known, self._since = event.done or 0, time.monotonic()
        super()._advance(event)

    def _show(self, event: Advance, now: float) -> None:
        if event.result is None or self._bar is not None:
            super()._show(event, now)
        if event.result is None:
            return
        done = cast("LayerDone", event.result)
        error = f"error on calibration text {percent(done.error)}, round-to-nearest {percent(done.rtn_error)}"
        how = "resumed" if done.resumed else f"{done.seconds:.1f} s, {self._left} left"
        rest = "" if self._bar is not None else f"; {how}"  # the bar has it
        say(f"  layer {done.index + 1} of {done.total}: {error}{rest}", err=False, indent="    ")

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
