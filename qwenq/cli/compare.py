"""``qwenq compare``: two runs row by row, and a gate that fails on what got worse."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.printing import to_standard_output
from qwenq.errors import UsageError
from qwenq.results import ENVIRONMENT_FILE, RESULTS_FILE

if TYPE_CHECKING:
    from qwenq.reporting.collect import Collection


@app.command()
def compare(
    baseline: Annotated[Path, typer.Argument(help="Run folder to compare with.")],
    new: Annotated[Path, typer.Argument(help="Run folder to judge.")],
    fail_on: Annotated[
        str | None,
        typer.Option(
            help="Conditions, comma-separated: accuracy:significant, speed:<0.95 (new / baseline), kl:>0.05 "
            "(new − baseline) … ; none: compare only. [default: accuracy:significant, kl:>0.05, speed:<0.95, "
            "memory:>1.05, size:>1.0, those that the baseline has rows for]"
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary fit for a pull request.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    more_baseline: Annotated[
        list[Path] | None, typer.Option(help="Another turn of BASELINE: speed and memory are of all turns.")
    ] = None,
    more_new: Annotated[list[Path] | None, typer.Option(help="Another turn of NEW.")] = None,
) -> None:
    """Say which differences between two runs are real.

    Exit code 1: a regression. 3: something that was asked about is missing or cannot be compared (another
    protocol, task version, model, dtype or machine); that is no pass. 0: passed.
    """
    from qwenq.reporting import gate, gate_output
    from qwenq.reporting.compare import compare as compare_rows
    from qwenq.storage import atomic_write_bytes

    conditions = gate.asked_by(fail_on)
    sides = [[baseline, *(more_baseline or [])], [new, *(more_new or [])]]
    _check_folders([*sides[0], *sides[1]], {"--markdown": markdown, "--junit": junit})
    before, after = (_side(first, more, judged=number == 1) for number, (first, *more) in enumerate(sides))
    comparisons = compare_rows(before, after)
    verdict = gate.judge(comparisons, conditions, strict=fail_on is not None)
    lines = list(gate_output.text_lines(verdict))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        lines = [*gate_output.unheard(lines), *gate_output.github_annotations(verdict)]
    try:
        if markdown is not None:
            text = gate_output.markdown_text(verdict, str(baseline), str(new))
            atomic_write_bytes(markdown, text.encode())
        if junit is not None:
            atomic_write_bytes(junit, gate_output.junit_text(verdict).encode())
    finally:  # the verdict is worth more than a file of it
        _print(lines)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


def _side(first: Path, more: list[Path], *, judged: bool) -> Collection:
    """A run with its further turns; of those that are none, a word."""
    from qwenq.reporting.collect import collect
    from qwenq.reporting.turns import idle_turns, with_turns

    run, turns = collect([first]), collect(more) if more else None
    for name in idle_turns(run, turns):
        typer.echo(f"note: {name} adds no turn to {first}: {_NO_TURN}", err=True)
    return with_turns(run, turns, judged=judged)


_NO_TURN = "it has no speed, time, memory or energy of the same weights at the same point on that machine"


def _check_folders(runs: list[Path], files: dict[str, Path | None]) -> None:
    """A run compared with itself would always pass, and one counted twice would look less noisy."""
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
    """Print what is known already; a reader who has seen enough, such as ``head``, changes no exit code.

    Raises:
        StorageError: standard output is a file, and the disk refused.
    """
    with suppress(BrokenPipeError), to_standard_output():
        for line in lines:
            typer.echo(line)
