"""``qwenq profile``: how fast a model runs, and what it needs."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import DeviceName, KernelName, SeedOfWeights
from qwenq.cli.printing import as_typed, to_standard_output, typed_command
from qwenq.errors import UsageError, visible
from qwenq.events import Advance, Event, Notice, Start
from qwenq.results import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from qwenq.profiling.planning import Device, Planned
    from qwenq.profiling.points import Point
    from qwenq.profiling.subjects import Subjects
    from qwenq.profiling.table import PrintedTable

MOST_TOKENS = 10**9
RESUME_HINT = "what is measured is kept: the same command goes on where it stopped"


@app.command()
def profile(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Model folders or hub ids; `bundled`, or none, is the bundled model."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="New tokens after a prompt of --context, comma-separated; 0 for none.")
    ] = "2048",
    context: Annotated[str, typer.Option(help="Prompt tokens before them; the cards take 1.")] = "1",
    encode: Annotated[str, typer.Option(help="Prompts to encode, in tokens; 0 for none.")] = "2048",
    precision: Annotated[
        str, typer.Option(help="Of models that are not quantised: fp32, bf16, fp16, int8, int4.")
    ] = "fp32,bf16,int8,int4",
    attention: Annotated[
        str,
        typer.Option(help="v2, v1, off, sdpa, …, comma-separated; auto: grouped on a CPU, else sdpa."),
    ] = "auto",
    engine: Annotated[str, typer.Option(help="fast, transformers.")] = "fast",
    kernel: KernelName = "auto",
    device: DeviceName = "auto",
    weights: Annotated[
        Literal["stored", "random"], typer.Option(help="random: MODEL is a catalogue name, see qwenq plan.")
    ] = "stored",
    seed: SeedOfWeights = 0,
    budget: Annotated[str | None, typer.Option(help="Time for the whole sweep: 90s, 10m, 1h30m.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/profile-… without it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON lines.")] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Processes that share a model, one a GPU.")] = 1,
) -> None:
    """Measure speed and memory, each point in a process of its own.

    Points: models in each precision × attention × engine × length. One that cannot run says why, and the
    sweep goes on. Ctrl-C keeps what is done; the same command goes on.
    """
    from qwenq.profiling.planning import parse_budget
    from qwenq.profiling.points import refuse_unsplittable, require_known
    from qwenq.profiling.subjects import subjects_of

    seconds = parse_budget(budget) if budget else None
    lengths = _lengths(context, tokens, encode)
    attentions, engines = _names(attention, "--attention"), _names(engine, "--engine")
    require_known(attentions, engines, kernel)
    given: list[str | None] = list(dict.fromkeys(models)) if models else [None]
    found = subjects_of(given, _names(precision, "--precision"), weights, seed)
    if tp > 1:
        refuse_unsplittable(found.subjects, engines)
    for notice in found.notices:
        typer.echo(f"note: {notice}", err=True)
    points = partial(
        sweep_points, found, attentions=attentions, engines=engines, lengths=lengths, kernel=kernel, tp=tp
    )
    folder = out or Path("runs") / f"profile-{'-'.join(found.shapes)}"
    _measure(found, points, folder, device, seconds, as_json)


def sweep_points(found: Subjects, device: str, **choices: Any) -> list[Point]:
    """Every combination, once the device is known."""
    from qwenq.profiling.points import sweep

    return sweep(found.subjects, device=device, **choices)


def _measure(
    found: Subjects,
    points: Callable[..., list[Point]],
    folder: Path,
    device: str,
    seconds: float | None,
    as_json: bool,
) -> None:
    """Plan the points, measure those that the folder lacks, show all."""
    from qwenq.environment import environment
    from qwenq.profiling.child import probe
    from qwenq.profiling.planning import plan, read_device
    from qwenq.profiling.sweep import run_sweep
    from qwenq.storage import locked

    command = typed_command()
    began = time.monotonic()
    try:
        with locked(folder):  # before anything is timed: two commands would measure each other
            place = read_device(probe(device))
            planned = plan(points(device=place.device), found.shapes, place)
            if not as_json:
                show_plan(planned, place, seconds, folder)
            options: dict[str, Any] = {"environment": environment(), "command": command}
            listener = _Listener(as_json)
            left = None if seconds is None else seconds - (time.monotonic() - began)  # the probe counts, too
            progress = run_sweep(planned, folder, listener, budget=left, **options)
        if not as_json:
            _show(folder, planned, progress.kept)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; {RESUME_HINT}: {command}", err=True)
        raise


def show_plan(planned: Sequence[Planned], place: Device, budget: float | None, folder: Path) -> None:
    """Print what will be measured, in which order, and about how long it takes."""
    from qwenq.storage import readable_bytes

    total, load = sum(each.seconds for each in planned), sum(each.load for each in planned)
    count = f"{len(planned)} point{'' if len(planned) == 1 else 's'}"
    limit = f", budget {_clock(budget)}" if budget is not None else ""
    loading = f" ({_clock(load)} of it to start and load)"
    typer.echo(
        f"plan: {count} on {place.device}, about {_clock(total)}{loading}{limit}; into {visible(str(folder))}"
    )
    if budget is not None and sum(each.needed for each in planned) > budget:
        typer.echo(
            "  to load and measure each once takes more than the budget: the last points may be skipped"
        )
    elif budget is not None and total > budget:
        typer.echo("  more than the budget: fewer repetitions, and generations that do not fit are skipped")
    for each in planned:
        seconds = f"about {_clock(each.seconds)} ({_clock(each.load)} to load)"
        estimate = each.too_large or f"{seconds}, {readable_bytes(each.nbytes)}"
        typer.echo(f"  {each.point.label}: {estimate}")


class _Listener:
    """One line for each point on stderr, or rows as JSON on stdout."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._began = as_json, time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Start) and not self._json:
            share = f", {_clock(event.limit)} of the budget" if event.limit is not None else ""
            about = f"about {_clock(event.seconds or 0)}{share}"
            typer.echo(f"{event.done + 1} of {event.total}: {event.step}, {about}", err=True)
        elif isinstance(event, Advance) and isinstance(event.result, Row) and self._json:
            with to_standard_output():
                typer.echo(json.dumps(event.result.to_json(), ensure_ascii=False))
        elif isinstance(event, Notice):
            typer.echo(f"note: {event.text}", err=True)


def _show(folder: Path, planned: Sequence[Planned], kept: int) -> None:
    """Print the table of this sweep's points, those measured earlier included."""
    from rich.console import Console

    from qwenq.profiling.table import table
    from qwenq.results import read_rows

    wanted = [(each.point.place, each.point.subject.model) for each in planned]
    rows = [row for row in read_rows(folder) if (row.point, row.model) in wanted]
    printed = table(rows)
    console = Console(highlight=False, markup=False, emoji=False)  # a name is a name
    if not console.is_terminal:  # a pipe has no width
        console.width = 160
    console.print(", ".join(f"{name} {value}" for name, value in printed.constant))
    _print_table(console, printed)
    if any("–" in cell for line in printed.lines for cell in line):
        console.print("in brackets: 95 % intervals of the median")
    for note in printed.notes:
        console.print(note)
    if kept:
        console.print(f"{kept} of {len(planned)} points were measured before")
    again = as_typed(["qwenq", "report", str(folder)])
    console.print(f"rows: {visible(str(folder))}; next: {again}")


def _print_table(console: Console, printed: PrintedTable) -> None:
    """Print the widest layout that fits the terminal with every figure in one piece."""
    from rich.measure import Measurement
    from rich.table import Table

    for headings, lines in ((printed.headings, printed.lines), printed.folded):
        grid = Table(box=None, pad_edge=False)
        for heading in headings:
            grid.add_column(heading, overflow="fold")
        for line in lines:
            grid.add_row(*line)
        unbound = console.options.update(max_width=10_000)  # else the measurement is cut to the console
        if Measurement.get(console, unbound, grid).maximum <= console.width:
            console.print(grid)
            return
    for text in printed.paragraphs(console.width):
        console.print(text)


def _lengths(context: str, tokens: str, encode: str) -> list[tuple[int, int]]:
    """Return (prompt, new tokens) of every point; one new token where only the prompt is measured."""
    from qwenq.profiling.points import lengths_of

    news, prompts, encoded = (
        _numbers(text, option)
        for text, option in ((tokens, "--tokens"), (context, "--context"), (encode, "--encode"))
    )
    return lengths_of(prompts, news, encoded)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in _names(text, option)]
        if max(numbers) > MOST_TOKENS:
            raise UsageError(f"no cache holds more than {MOST_TOKENS:,} tokens", where=option)
        return numbers
    except ValueError as error:
        raise UsageError(
            f"{text!r} is no list of whole numbers", where=option, hint="write 2048,8192"
        ) from error


def _names(text: str, option: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError("nothing is named", where=option)
    return names


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
