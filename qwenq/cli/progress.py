"""Show what a command does: its sweep, its layers, JSON lines for machines; with ``--verbose`` details."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from qwenq.cli.printing import percent
from qwenq.errors import visible
from qwenq.events import Advance, Event, Finish, Listener, Notice, Start, rough_time
from qwenq.progress import StepListener, note, say
from qwenq.results import Row
from qwenq.storage import readable_bytes

if TYPE_CHECKING:
    from qwenq.gptq.pipeline import LayerDone
    from qwenq.profiling.planning import PlannedSweep
    from qwenq.quantization import Quantised


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
            self._time_from(event.done or 0)
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
