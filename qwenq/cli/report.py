"""Write a report of run folders (``qwenq report``), and compare two runs (``qwenq compare``)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.options import Given, recipe_options
from qwenq.cli.printing import note, to_standard_output
from qwenq.errors import UsageError, visible
from qwenq.events import Event, Notice
from qwenq.results import ENVIRONMENT_FILE, RESULTS_FILE

if TYPE_CHECKING:
    from qwenq.reporting.collect import Collection

# ``qwenq report``: run folders in; a model card, a page, and data out.


@app.command()
@recipe_options("report.title")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of qwenq eval, profile or run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. [default: reports/NAME of the first run folder]")
    ] = None,
    *,
    given: Given,
    card: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Quantised folder whose model card gets the tables and plots; may be given several times. "
            "[default: those that the runs' commands name]",
        ),
    ] = None,
    no_card: Annotated[bool, typer.Option("--no-card", help="Leave model cards as they are.")] = False,
) -> None:
    """Write model card tables, an HTML page with plots, and data; fill the quantised folders' model cards.

    Nothing is measured, and no model is loaded. Of a card only the marked sections and qwenq's scores change.
    """
    from qwenq.publishing.measured import fill_cards
    from qwenq.reporting.write import write_report

    if card and no_card:
        raise UsageError(
            "--card and --no-card exclude each other", where="--no-card", hint="give one of them"
        )
    folder = out or Path("reports") / runs[0].resolve().name
    page = write_report(runs, folder, given["report"].get("title"))
    for written in fill_cards(runs, page, [] if no_card else card, _print_notice):
        note(f"card: {visible(str(written))}")
    typer.echo(visible(str(page)))


def _print_notice(event: Event) -> None:
    if isinstance(event, Notice):
        note(visible(event.text))


# ``qwenq compare``: compare two runs row by row, and fail on regressions.


@app.command()
@recipe_options("gate.fail_on")
def compare(
    baseline: Annotated[
        Path,
        typer.Argument(
            help="Run folder to compare with, or a folder of several: the one of NEW's machine is taken."
        ),
    ],
    new: Annotated[Path, typer.Argument(help="Run folder to judge.")],
    *,
    given: Given,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    more_baseline: Annotated[
        list[Path] | None,
        typer.Option(help="Another repeat of BASELINE: speed and memory are taken over all repeats."),
    ] = None,
    more_new: Annotated[list[Path] | None, typer.Option(help="Another repeat of NEW.")] = None,
) -> None:
    """Compare two runs, and fail on regressions.

    Exit code 0: passed. 1: a regression. 3: a row of a condition is missing or cannot be compared (another
    protocol, task version, model, dtype or machine), which does not count as passed.
    """
    from qwenq.reporting import gate
    from qwenq.reporting.compare import compare as compare_rows
    from qwenq.storage import atomic_write_bytes

    fail_on = given["gate"].get("fail_on")
    conditions = gate.asked_by(fail_on)
    baseline = _of_this_machine(baseline, new)
    sides = [[baseline, *(more_baseline or [])], [new, *(more_new or [])]]
    _check_folders([*sides[0], *sides[1]], {"--markdown": markdown, "--junit": junit})
    before, after = (_side(first, more, judged=number == 1) for number, (first, *more) in enumerate(sides))
    comparisons = compare_rows(before, after)
    verdict = gate.judge(comparisons, conditions, strict=fail_on is not None)
    lines = list(gate.text_lines(verdict))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        lines = [*gate.without_commands(lines), *gate.github_annotations(verdict)]
    try:
        if markdown is not None:
            text = gate.markdown_text(verdict, str(baseline), str(new))
            atomic_write_bytes(markdown, text.encode())
        if junit is not None:
            atomic_write_bytes(junit, gate.junit_text(verdict).encode())
    finally:  # the verdict is worth more than a file of it
        _print(lines)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


def _of_this_machine(baseline: Path, new: Path) -> Path:
    """Return the run folder to compare with, with a note on which of several it is."""
    from qwenq.reporting.collect import choose_baseline

    chosen = choose_baseline(baseline, new)
    if chosen.folder != baseline:
        why = "of the same machine" if chosen.same_machine else "no baseline is of this machine"
        note(f"compared with {visible(str(chosen.folder))}: {why}")
    return chosen.folder


def _side(first: Path, more: list[Path], *, judged: bool) -> Collection:
    """Return a run with its further repeats, with a note on repeats that add nothing."""
    from qwenq.reporting.collect import collect
    from qwenq.reporting.compare import idle_repeats, with_repeats

    run, turns = collect([first]), collect(more) if more else None
    for name in idle_repeats(run, turns):
        note(f"{name} adds no repeat to {first}: {_NO_REPEAT}")
    return with_repeats(run, turns, judged=judged)


_NO_REPEAT = "it has no speed, time, memory or energy of the same weights at the same point on that machine"


def _check_folders(runs: list[Path], files: dict[str, Path | None]) -> None:
    """Raise UsageError for a run that is named twice, which would look less noisy, or a file in its way."""
    places = [run.resolve() for run in runs]
    if twice := [run for run, place in zip(runs, places, strict=True) if places.count(place) > 1]:
        raise UsageError("this run is named twice", where=twice[-1], hint="name each run folder once")
    for option, file in files.items():
        if file is not None and file.is_dir():
            raise UsageError(f"{option} is a folder", where=file, hint="name a file in it")
        measured = {place / name for place in places for name in (RESULTS_FILE, ENVIRONMENT_FILE)}
        if file is not None and file.resolve() in measured:
            raise UsageError(f"{option} would replace what was measured", where=file, hint="name a new file")


def _print(lines: list[str]) -> None:
    """Print lines; a reader that closes the pipe early, such as ``head``, does not change the exit code.

    Raises:
        StorageError: standard output is a file, and the disk refused.
    """
    with suppress(BrokenPipeError), to_standard_output():
        for line in lines:
            typer.echo(line)
