"""Print: notes, tables, JSON and commands to copy; a failing standard output becomes a message."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qwenq.errors import StorageError, visible
from qwenq.events import Event, Notice
from qwenq.progress import note

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qwenq.reporting.collect import Collection
    from qwenq.reporting.tables import Cell
    from qwenq.reporting.tables import Table as ReportTable
    from qwenq.results import Row


def note_events(event: Event) -> None:
    """Print the notices of a function that shows nothing else."""
    if isinstance(event, Notice):
        note(event.text)


def percent(share: float) -> str:
    """Return a share in percent, with two significant digits and no exponent: an Int8's error shows, too."""
    value = 100 * share
    digits = max(0, 1 - math.floor(math.log10(value))) if 0 < value < math.inf else 2
    return f"{value:.{min(digits, 8)}f}%"


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def print_rows(run: Path, rows: Sequence[Row]) -> None:
    """Print the run folder and its rows as one JSON object."""
    print_json({"run": str(run), "rows": [row.to_json() for row in rows]})


def table_console(width: int, *, markup: bool = False) -> Console:
    """Return a console for tables: as wide as the terminal, or ``width`` in a pipe; a name stays a name."""
    from rich.console import Console

    console = Console(highlight=False, markup=markup, emoji=False)
    if not console.is_terminal:  # a pipe has no width
        console.width = width
    return console


def columns(titles: Sequence[str], lines: Iterable[Sequence[str]], labels: int = 1) -> Table:
    """Return a table without rules: so many labels on the left, which may break, and figures on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for place, title in enumerate(titles):
        label = place < labels
        table.add_column(title, justify="left" if label else "right", overflow="fold", no_wrap=not label)
    for line in lines:
        table.add_row(*line)
    return table


def print_tables(
    folder: Path,
    rows: Sequence[Row],
    makers: Sequence[Callable[[Collection, str], ReportTable | None]],
) -> None:
    """Print these tables of the report, of some rows of a run folder."""
    from qwenq.reporting.collect import rows_of_run
    from qwenq.reporting.text import clean

    console, found = table_console(160), rows_of_run(folder, rows)
    for family in found.families:
        for table in filter(None, (make(found, family) for make in makers)):
            console.print(f"{clean(family)}: {table.title}")
            _print_table(console, table)
            notes = (f"[{number}] {note}" for number, note in enumerate(table.notes, 1))
            console.print("\n".join(filter(None, (table.sentence, *notes))), end="\n\n")
    if any(row.low is not None for row in rows):
        console.print("in brackets: 95 % intervals")
    console.print(f"run folder: {visible(str(folder))}", soft_wrap=True)


def _print_table(console: Console, table: ReportTable) -> None:
    """Print the widest form that fits the terminal, so that no figure is cut off or broken."""
    from rich.measure import Measurement

    lines = [[_text(cell, table.number(cell)) for cell in line.cells] for line in table.lines]
    folded = [[text.replace(" (", "\n(") for text in line] for line in lines]  # half as wide
    titles = [title.replace(" ", "\n") for title in table.headers]
    for headings, cells in ((table.headers, lines), (titles, folded)):
        grid = columns(headings, cells, table.labels)
        unbound = console.options.update(max_width=10_000)  # else the measure is at most the terminal's width
        if Measurement.get(console, unbound, grid).maximum <= console.width:
            console.print(grid)
            return
    for line in lines:
        console.print(", ".join(filter(None, line[: table.labels])))
        for heading, text in zip(table.headers[table.labels :], line[table.labels :], strict=True):
            console.print(f"  {heading}: {text}")


def _text(cell: Cell, number: int | None) -> str:
    interval = f" ({cell.low}–{cell.high})" if cell.low is not None else ""
    return f"{cell.text}{interval}{f' [{number}]' if number else ''}"


def as_typed(words: Iterable[str]) -> str:
    """Return a command for a shell; text that is not UTF-8, as a folder's name may be, in bash's quotes."""
    return " ".join(map(_quoted, words))


def typed_command(processes: int = 1) -> str:
    """Return this process's command as it was typed; for several processes that of torchrun."""
    if processes == 1:
        return as_typed(["qwenq", *sys.argv[1:]])
    here = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    options = [*(["--nnodes", machines] if machines != "1" else []), "--nproc-per-node", here]
    return as_typed(["torchrun", *options, "-m", "qwenq", *sys.argv[1:]])


def _quoted(word: str) -> str:
    raw = os.fsencode(word)
    try:
        return shlex.quote(raw.decode())
    except UnicodeDecodeError:
        plain = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in raw)
        return f"$'{''.join(plain)}'"


@contextmanager
def stop_notice(kept: str, processes: int = 1) -> Iterator[None]:
    """Print how to go on, where Ctrl-C or SIGTERM ends what is within; ``kept`` as in "answers are kept"."""
    try:
        yield
    except KeyboardInterrupt:
        command = typed_command(processes)
        typer.echo(f"\nstopped; {kept}: the same command goes on where it stopped: {command}", err=True)
        raise


@contextmanager
def explained_output() -> Iterator[None]:
    """Raise StorageError within a command where the disk behind standard output refuses to write.

    A reader that has closed the pipe stays a BrokenPipeError, which ends a command silently.
    """
    stream, names = sys.stdout, ("write", "flush")
    if stream is None:  # it was closed before the command began
        yield
        return
    before = {name: getattr(stream, name) for name in names}
    for name, function in before.items():
        setattr(stream, name, _explained(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(stream, name, function)


def _explained(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            if arguments in (("",), (b"",)):  # typer asks by writing nothing
                raise
            # The rest goes nowhere: Python flushes once more at its end, and would complain then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            message = f"it cannot be written: {error.strerror}"
            raise StorageError(message, where="standard output") from error

    return call
