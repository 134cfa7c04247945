"""Show a quantisation: live on a terminal, plain lines in a log, JSON lines for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import typer

from qwenq.cli.progress import show_progress
from qwenq.events import Advance, Event, Notice, Start, Update
from qwenq.storage import readable_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from qwenq.gptq.quantise import LayerDone
    from qwenq.quantize import Quantised

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
                typer.echo(f"· {text}")
            case Start(step, total, "layers"):
                self._stack.close()
                if sys.stdout.isatty() and not self._quiet:
                    self._bar = self._stack.enter_context(_layer_bar())
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
        error = f"error {done.error:.2%}, round-to-nearest {done.rtn_error:.2%}"
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
            "checkpoint": str(result.folder),
            "size": f"{readable_bytes(result.weight_bytes)} ({share:.0%} of {base})",
            "time": seconds,
            **(result.check.summary() if result.check else {"check": "not possible with random weights"}),
        }
        typer.echo()
        for name, value in lines.items():
            typer.echo(f"{name:<14}{value}")

    def _left(self, done: LayerDone) -> str:
        if not self._fresh:
            return _UNKNOWN
        left = round(sum(self._fresh) / len(self._fresh) * (done.total - done.index - 1))
        return f"{left // 60}:{left % 60:02d}"


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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers ·"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TextColumn("{task.fields[left]}"),  # rich's estimate forgets what took longer than half a minute
        TextColumn("left"),
        transient=True,
    )
