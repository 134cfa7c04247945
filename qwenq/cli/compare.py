"""``qwenq compare``: two runs row by row, and a gate that fails on what got worse."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.app import app
from qwenq.errors import UsageError


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
    from qwenq.reporting.collect import collect
    from qwenq.reporting.compare import compare as compare_rows
    from qwenq.reporting.turns import with_turns
    from qwenq.storage import atomic_write_bytes

    for option, file in (("--markdown", markdown), ("--junit", junit)):
        if file is not None and file.is_dir():
            raise UsageError(f"{option} is a folder", where=file, hint="name a file in it")
    conditions = gate.asked_by(fail_on)
    before, after = (
        with_turns(collect([first]), collect(more) if more else None)
        for first, more in ((baseline, more_baseline), (new, more_new))
    )
    comparisons = compare_rows(before, after)
    verdict = gate.judge(comparisons, conditions, strict=fail_on is not None)
    for line in gate_output.text_lines(verdict):
        typer.echo(line)
    if markdown is not None:
        text = gate_output.markdown_text(verdict, str(baseline), str(new))
        atomic_write_bytes(markdown, text.encode())
    if junit is not None:
        atomic_write_bytes(junit, gate_output.junit_text(verdict).encode())
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in gate_output.github_annotations(verdict):
            typer.echo(line)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)
