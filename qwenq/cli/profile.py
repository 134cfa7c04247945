"""``qwenq profile``: speed and memory of models."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli.app import app
from qwenq.cli.next import next_commands
from qwenq.cli.options import (
    DeviceName,
    Given,
    KernelName,
    ModelArguments,
    Quiet,
    RandomSeed,
    Verbose,
    listed_names,
    listed_numbers,
    recipe_options,
)
from qwenq.cli.printing import notes, stop_notice, table_console, typed_command
from qwenq.cli.progress import ProfileProgress, with_details
from qwenq.errors import UsageError, visible
from qwenq.events import rough_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from qwenq.profiling.planning import Device, Planned
    from qwenq.profiling.spec import Point, Subjects
    from qwenq.profiling.table import PrintedTable
    from qwenq.results import Row


@app.command()
@recipe_options("profile.*", "weights")
def profile(
    typed: typer.Context,
    models: ModelArguments = None,
    *,
    given: Given,
    context: Annotated[
        str, typer.Option(help="Prompt tokens before generated ones, comma-separated; Qwen's cards have 1.")
    ] = "1",
    precision: Annotated[
        str,
        typer.Option(
            help="Precisions of models that are not quantised: fp32, bf16, fp16, int8, int4; with "
            "--endpoint, the one that the server computes in."
        ),
    ] = "fp32,bf16,int8,int4",
    kernel: KernelName = "auto",
    device: DeviceName = "auto",
    seed: RandomSeed = 0,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure a model behind an OpenAI-compatible server, such as http://HOST:8000/v1 (key in "
            "OPENAI_API_KEY), with streamed requests.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --endpoint: the model's name there.")] = None,
    concurrency: Annotated[
        str, typer.Option(help="With --endpoint: requests at once, comma-separated.")
    ] = "1,4,16,64",
    input: Annotated[int, typer.Option(help="With --endpoint: tokens of each prompt.")] = 512,
    output: Annotated[int, typer.Option(help="With --endpoint: tokens of each answer.")] = 128,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. [default: runs/profile-MODEL; with --endpoint runs/served-MODEL]"),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON lines.")] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Processes that share a model, one a GPU.")] = 1,
) -> None:
    """Measure speed and memory, each point in a separate process.

    Points: models in each precision × attention × engine × length. A point that cannot run is reported with
    the reason, and the sweep goes on. Ctrl-C keeps what is measured; the same command goes on. With
    --endpoint: latency and throughput of a served model, at each concurrency.
    """
    from qwenq.profiling.planning import parse_budget
    from qwenq.profiling.spec import lengths_of, refuse_unsplittable, require_known, subjects_of
    from qwenq.recipe import ProfileRecipe, Recipe

    chosen = Recipe().override(given[""], profile=given["profile"])
    points = chosen.profile or ProfileRecipe()
    budget = parse_budget(points.budget) if points.budget else None
    progress = ProfileProgress(as_json=as_json, quiet=quiet, verbose=verbose)
    given_options = _typed(typed)
    _check_endpoint(endpoint, models, given_options)
    if endpoint is not None:
        served_as = precision if "precision" in given_options else "served"
        load = (listed_numbers(concurrency, "--concurrency", "1,4,16"), input, output)
        _profile_served(endpoint, model, served_as, load, budget, out, progress)
        return
    lengths = lengths_of(listed_numbers(context, "--context", "1,1024"), points.tokens, points.encode)
    require_known(points.attention, points.engine, kernel)
    named: list[str | None] = [*dict.fromkeys(models)] if models else [None]
    found = subjects_of(named, listed_names(precision, "--precision"), chosen.weights, seed)
    if tp > 1:
        refuse_unsplittable(found.subjects, points.engine)
    notes(found.notices)
    sweep = partial(
        sweep_points,
        found,
        attentions=points.attention,
        engines=points.engine,
        lengths=lengths,
        kernel=kernel,
        tp=tp,
    )
    folder = out or Path("runs") / f"profile-{'-'.join(found.shapes)}"
    with stop_notice("what is measured is kept"):
        planned, kept = _measure(found, sweep, folder, device, budget, progress)
        if not as_json:
            _show(folder, planned, kept)


def sweep_points(found: Subjects, device: str, **choices: Any) -> list[Point]:
    """Return every combination, once the device is known."""
    from qwenq.profiling.spec import sweep

    return sweep(found.subjects, device=device, **choices)


def _measure(
    found: Subjects,
    points: Callable[..., list[Point]],
    folder: Path,
    device: str,
    budget: float | None,
    progress: ProfileProgress,
) -> tuple[list[Planned], int]:
    """Plan the points and measure those that the folder lacks; return all, and how many it had."""
    from qwenq.environment import environment
    from qwenq.profiling.child import probe
    from qwenq.profiling.planning import plan, read_device
    from qwenq.profiling.sweep import run_sweep
    from qwenq.storage import locked

    began = time.monotonic()
    with locked(folder):  # before anything is timed: two commands would measure each other
        chosen = read_device(probe(device))
        planned = plan(points(device=chosen.device), found.shapes, chosen)
        if not progress.quiet:
            show_plan(planned, chosen, budget, folder)
        left = None if budget is None else budget - (time.monotonic() - began)  # the probe counts too
        facts, command = environment(), typed_command()
        with with_details(progress, progress.verbose) as listener:
            done = run_sweep(planned, folder, listener, environment=facts, budget=left, command=command)
    return list(planned), done.kept


def show_plan(planned: Sequence[Planned], device: Device, budget: float | None, folder: Path) -> None:
    """Print what will be measured, in which order, and about how long it takes."""
    from qwenq.storage import readable_bytes

    total, load = sum(each.seconds for each in planned), sum(each.load for each in planned)
    count = f"{len(planned)} point{'' if len(planned) == 1 else 's'}"
    limit = f", budget {rough_time(budget)}" if budget is not None else ""
    loading = f" ({rough_time(load)} of it to start and load)"
    typer.echo(
        f"plan: {count} on {device.device}, about {rough_time(total)}{loading}{limit}; "
        f"into {visible(str(folder))}"
    )
    if budget is not None and sum(each.needed for each in planned) > budget:
        typer.echo(
            "  to load and measure each once takes more than the budget: the last points may be skipped"
        )
    elif budget is not None and total > budget:
        typer.echo("  more than the budget: fewer repetitions, and generations that do not fit are skipped")
    for each in planned:
        seconds = f"about {rough_time(each.seconds)} ({rough_time(each.load)} to load)"
        estimate = each.too_large or f"{seconds}, {readable_bytes(each.nbytes)}"
        typer.echo(f"  {each.point.label}: {estimate}")


_OF_ENDPOINT = {"endpoint", "model", "concurrency", "input", "output"}
_OF_BOTH = {"models", "precision", "budget", "out", "quiet", "verbose", "as_json"}
"""Options of a served model; those that a model measured here has as well."""


def _typed(context: typer.Context) -> list[str]:
    """Return the options that were typed, be it with their default."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    # Compared by its name: typer uses either its bundled click or the installed one.
    return [name for name, source in sources if source is not None and source.name == "COMMANDLINE"]


def _check_endpoint(endpoint: str | None, models: list[str] | None, typed: Sequence[str]) -> None:
    """Raise UsageError for options that exclude each other."""
    if endpoint is None:
        if stray := [name for name in typed if name in _OF_ENDPOINT]:
            raise UsageError(
                f"--{stray[0]} is of a served model",
                where=f"--{stray[0]}",
                hint="name its server with --endpoint, or leave this option out",
            )
        return
    if models:
        raise UsageError(
            "--endpoint measures the server's model alone",
            where="--endpoint",
            hint="name it with --model, and measure local models into the same --out with another command",
        )
    if stray := [name for name in typed if name not in _OF_ENDPOINT | _OF_BOTH]:
        raise UsageError(
            "the server decides how it runs its model",
            where=f"--{stray[0]}",
            hint="leave this option out, and set it on the server",
        )


def _profile_served(
    endpoint: str,
    model: str | None,
    precision: str,
    load: tuple[list[int], int, int],
    budget: float | None,
    out: Path | None,
    progress: ProfileProgress,
) -> None:
    """Measure a served model and print its table."""
    from qwenq.environment import environment
    from qwenq.profiling.served import Load, find_target, profile_served
    from qwenq.storage import locked

    wanted = Load(tuple(load[0]), *load[1:])
    key = os.environ.get("OPENAI_API_KEY")
    target = find_target(endpoint, model, key, progress, precision=precision)
    folder = out or Path("runs") / f"served-{target.model.name}"
    with stop_notice("what is measured is kept"), locked(folder):
        facts, command = environment(), typed_command()
        with with_details(progress, progress.verbose) as listener:
            rows = profile_served(
                target, wanted, folder, listener, environment=facts, budget=budget, command=command
            )
    if not progress.as_json:
        _show_rows(folder, rows)


def _show(folder: Path, planned: Sequence[Planned], kept: int) -> None:
    """Print the table of this sweep's points, those measured earlier included."""
    from qwenq.results import read_rows

    wanted = [(each.point.place, each.point.subject.model) for each in planned]
    earlier = f"{kept} of {len(planned)} points were measured earlier" if kept else ""
    _show_rows(folder, [row for row in read_rows(folder) if (row.point, row.model) in wanted], earlier)


def _show_rows(folder: Path, rows: Sequence[Row], remark: str = "") -> None:
    """Print a table of rows, and the command that makes a report of their folder."""
    from qwenq.profiling.table import table

    printed = table(rows)
    console = table_console(160)
    console.print(", ".join(f"{name} {value}" for name, value in printed.constant))
    _print_table(console, printed)
    if any("–" in cell for line in printed.lines for cell in line):
        console.print("in brackets: 95 % intervals of the median")
    for text in (*printed.notes, *([remark] if remark else [])):
        console.print(text)
    console.print(f"run folder: {visible(str(folder))}", soft_wrap=True)
    next_commands(("report", folder))


def _print_table(console: Console, printed: PrintedTable) -> None:
    """Print the widest form that fits the terminal, so that no figure is cut off or broken."""
    from rich.measure import Measurement
    from rich.table import Table

    for headings, lines in ((printed.headings, printed.lines), printed.folded):
        grid = Table(box=None, pad_edge=False)
        for heading in headings:
            grid.add_column(heading, overflow="fold")
        for line in lines:
            grid.add_row(*line)
        unbound = console.options.update(max_width=10_000)  # else the measure is at most the terminal's width
        if Measurement.get(console, unbound, grid).maximum <= console.width:
            console.print(grid)
            return
    for text in printed.paragraphs(console.width):
        console.print(text)
