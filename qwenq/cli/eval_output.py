"""How an evaluation shows: live on a terminal, plain lines in a log, a table or JSON at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer

from qwenq.events import Advance, Event, Finish, Notice, Start
from qwenq.reporting.cut import cut_of

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.table import Table

    from qwenq.results import Row

_PLAIN_SECONDS = 10.0
_WIDE = 130
"""Columns of a terminal that has room for a score and its comparison in one line."""


class Progress:
    """A listener that shows an evaluation on stderr."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Bar | None = None
        self._task: Any = None
        self._left = _TimeLeft()
        self._begin("", 0, 0)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = self._stack.enter_context(_bar())
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
                if self._bar is None and unit == "items":
                    known = f", {done:,} known from records" if done else ""
                    items = "1 item" if total == 1 else f"{total:,} items"
                    typer.echo(f"{step}: {items}{known}", err=True)
            case Advance(result=None | bool() as correct):
                self._step(correct)
            case Notice(text):
                typer.echo(f"note: {text}", err=True)
            case Finish():
                self._clear()

    def _clear(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _begin(self, label: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._known = label, total, done, done
        self._correct = self._verdicts = 0
        self._since = self._told = time.monotonic()
        if self._bar is not None:
            self._left = _TimeLeft()
            self._task = self._bar.add_task(label, total=total, completed=done, accuracy="", left=self._left)

    def _step(self, correct: bool | None) -> None:
        self._done += 1
        self._verdicts += correct is not None
        self._correct += bool(correct)
        newly = " of those asked now" if self._known else ""
        share = f"{self._correct / self._verdicts:.1%} correct{newly}" if self._verdicts else ""
        now = time.monotonic()
        left = (now - self._since) / (self._done - self._known) * (self._total - self._done)
        if self._bar is not None and self._task is not None:
            self._left.end = now + left
            self._bar.update(self._task, completed=self._done, accuracy=share)
        elif now - self._told >= _PLAIN_SECONDS or self._done == self._total:
            self._told = now
            pace = f"{left:.0f} s left" if self._done < self._total else f"{now - self._since:.0f} s"
            parts = [f"{self._done:,} of {self._total:,}", share, pace]
            typer.echo(f"{self._name}: {', '.join(part for part in parts if part)}", err=True)


@dataclass
class _TimeLeft:
    """Shown anew whenever the bar is: it counts down while an answer is long, and is corrected by the next.

    Attributes:
        end: when all should be there, at the pace of all so far; None before the first.
    """

    end: float | None = None

    def __str__(self) -> str:
        if self.end is None:
            return "-:--:--"
        minutes, seconds = divmod(max(0, round(self.end - time.monotonic())), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def print_json(run: Path, rows: Sequence[Row]) -> None:
    """One object: the run folder and its new rows."""
    content = {"run": str(run), "rows": [row.to_json() for row in rows]}
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(run: Path, rows: Sequence[Row]) -> None:
    """Scores with their intervals, and each model beside its base; then what quantising cost by the check."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)  # a name is a name, whatever it looks like
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = 250
    checks = [row for row in rows if "task" not in row.point]
    rows = [row for row in rows if "task" in row.point]
    order = {name: place for place, name in enumerate(dict.fromkeys(row.point["task"] for row in rows))}
    rows = sorted(rows, key=lambda row: order[row.point["task"]])
    compared = [row for row in rows if row.details.keys() & {"paired", "unpaired"}]
    aside = bool(compared) and console.width < _WIDE
    if rows:  # a split without answers has no score
        console.print(_table(rows, beside=bool(compared) and not aside))
    lines = [_in_a_line(row) for row in compared] if aside else []
    for line in [*lines, *_check_lines(checks), *_remarks(rows), *_headlines(rows)]:
        console.print(line, soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)


def _table(rows: Sequence[Row], *, beside: bool) -> Table:
    """One line a score; with what it is beside its base, where there is room for that."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("task", "protocol", "model"):
        table.add_column(title, overflow="fold")
    figures = ("score", "± SE", "95 % interval", "items", "asked by", "cut")
    for title in (*figures, *(("change", "lost / won", "p") if beside else ())):
        table.add_column(title, justify="right", no_wrap=True)
    if beside:
        table.add_column("beside its base", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row), *(_comparison(row) if beside else ()))
    return table


def _in_a_line(row: Row) -> str:
    """What the wide table has in its last columns."""
    change, counts, p, beside = _comparison(row)
    figures = f"change {change} points, lost / won {counts}, p {p}; " if change else ""
    task, _, model, *_ = _cells(row)
    return f"{task}, {model}: {figures}{beside}"


def _cells(row: Row) -> tuple[str, ...]:
    metric = row.metric.removeprefix("accuracy").lstrip(".")
    task = f"{row.point['task']}{f' ({metric})' if metric else ''}"
    interval = f"{row.low:.1%} – {row.high:.1%}" if row.low is not None and row.high is not None else "-"
    model = f"{row.model.name} {row.model.precision}"
    value = f"{row.value:.1%}" if row.value is not None else "-"
    found = row.details.get("standard_error")
    error = f"± {100 * found:.1f}" if isinstance(found, float) else "-"
    asked = str(row.settings.get("asked", "-"))
    cut = "-" if (found := cut_of(row)) is None else f"{found.share:.1%}"
    return task, str(row.point["protocol"]), model, value, error, interval, f"{row.n:,}", asked, cut


def _comparison(row: Row) -> tuple[str, ...]:
    from qwenq.paired.mcnemar import shown_p

    found = row.details.get("paired")
    if found is None:
        return "", "", "", row.details.get("unpaired", "")
    counts = f"{found['lost']} / {found['won']}"
    beside = f"{found['base']}: {found['sentence']}"
    return f"{100 * found['change']:+.1f}", counts, shown_p(found["p"]), beside


_CHECKS: dict[str, tuple[str, str, str]] = {
    "kl": ("KL divergence", ".4f", " nats a token"),
    "same_top": ("same top token", ".1%", ""),
    "perplexity.ratio": ("perplexity ×", ".3f", ""),
}


def _check_lines(rows: Sequence[Row]) -> list[str]:
    """A line a model: ``Tiny-GPTQ-Int4 int4 beside its base, by the check: KL divergence 0.0712 …``."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        name, form, unit = _CHECKS.get(row.metric, (row.metric, "g", ""))
        said = f"{name} {row.value:{form}}{unit}" if row.value is not None else f"{name}: {row.reason}"
        if row.low is not None and row.high is not None:
            said += f" ({row.low:{form}} – {row.high:{form}})"
        lines.setdefault(f"{row.model.name} {row.model.precision}", []).append(said)
    return [f"{model} beside its base, by the check: {'; '.join(said)}" for model, said in lines.items()]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader must not miss."""
    lines = [
        f"warning: {row.point['task']}, {row.model.name} {row.model.precision}: {found.warning}"
        for row in rows
        if (found := cut_of(row)) is not None and found.many
    ]
    if any(row.point.get("data") == "sample suite" for row in rows):
        lines.append("the sample suite is not the benchmark: its scores compare with nothing published")
    limits = {row.point["task"]: row.point["limit"] for row in rows if row.point.get("limit") is not None}
    if limits:
        all_ = limits.keys() == {row.point["task"] for row in rows}
        which, limit = "" if all_ else f"{', '.join(map(str, limits))}: ", next(iter(limits.values()))
        lines.append(f"{which}limited to the first {limit} items of each subject or task")
    return lines


def _headlines(rows: Sequence[Row]) -> list[str]:
    """A line for each model that was compared: its largest drop, and the verdict."""
    from qwenq.paired.compare import Paired
    from qwenq.paired.headline import Compared, headline
    from qwenq.paired.mcnemar import holm

    compared = [row for row in rows if "paired" in row.details]
    pairings = [Paired(*(row.details["paired"][key] for key in ("n", "lost", "won"))) for row in compared]
    by_model: dict[str, list[Compared]] = {}
    for row, pairing, p in zip(compared, pairings, holm([one.p for one in pairings]), strict=True):
        value, change = row.value or 0.0, row.details["paired"]["change"]
        name = f"{row.model.name} {row.model.precision} beside its base"
        tested = Compared(str(row.point["task"]), value - change, value, pairing, p)
        by_model.setdefault(name, []).append(tested)
    return [f"{name}: {headline(found, len(compared))}" for name, found in by_model.items()]


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TextColumn("{task.fields[left]} left", style="progress.remaining"),
        console=Console(stderr=True),
        transient=True,
    )
