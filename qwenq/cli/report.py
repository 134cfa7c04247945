"""Write a report of run folders (``qwenq report``), and compare two runs (``qwenq compare``)."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.options import Given, recipe_options
from qwenq.cli.printing import note_events
from qwenq.errors import UsageError, visible
from qwenq.results import ENVIRONMENT_FILE, RESULTS_FILE
from qwenq.stopping import is_child


@app.command()
@recipe_options("report.title")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of qwenq eval, profile or run; or a report, to make it anew."),
    ],
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
    """Write model card tables, an HTML page with plots, and data.

    The model cards of the quantised folders are filled. Nothing is measured, and no model is loaded. Of a
    card only the marked sections and qwenq's scores change.
    """
    from qwenq import api

    if card and no_card:
        raise UsageError(
            "--card and --no-card exclude each other", where="--no-card", hint="give one of them"
        )
    page = api.report(runs, out, given["report"].get("title"), [] if no_card else card, progress=note_events)
    if not is_child():  # `qwenq run` ends with it
        typer.echo(visible(str(page)))


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
    from qwenq import api
    from qwenq.reporting import gate
    from qwenq.storage import atomic_write_bytes

    runs = [baseline, new, *(more_baseline or []), *(more_new or [])]
    _check_files(runs, {"--markdown": markdown, "--junit": junit})
    verdict = api.compare(
        baseline,
        new,
        more_baseline=more_baseline or (),
        more_new=more_new or (),
        fail_on=given["gate"].get("fail_on"),
        progress=note_events,
    )
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


def _check_files(runs: list[Path], files: dict[str, Path | None]) -> None:
    """Raise UsageError for a file that cannot be written, or that would replace what was measured."""
    names = (RESULTS_FILE, ENVIRONMENT_FILE)
    measured = {
        found.resolve() for run in runs for name in names for found in (run / name, *run.glob(f"*/{name}"))
    }
    for option, file in files.items():
        if file is not None and file.is_dir():
            raise UsageError(f"{option} is a folder", where=file, hint="name a file in it")
        if file is not None and file.resolve() in measured:
            raise UsageError(f"{option} would replace what was measured", where=file, hint="name a new file")


def _print(lines: list[str]) -> None:
    """Print lines; a reader that closes the pipe early, such as ``head``, does not change the exit code.

    Raises:
        StorageError: standard output is a file, and the disk refused.
    """
    with suppress(BrokenPipeError):
        for line in lines:
            typer.echo(line)  # and flushed, so that a disk that refuses is known here
