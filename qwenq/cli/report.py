"""``qwenq report``: run folders in; a model card, a page, and data out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.options import Given, recipe_options


@app.command()
@recipe_options("report.title")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of qwenq eval, profile or run.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. [default: reports/NAME of the first run folder]")
    ] = None,
    *,
    given: Given,
) -> None:
    """Write model card tables, an HTML page with plots, and data.

    Reads run folders only: nothing is measured, and no model is loaded.
    """
    from qwenq.errors import visible
    from qwenq.reporting.write import write_report

    folder = out or Path("reports") / runs[0].resolve().name
    typer.echo(visible(str(write_report(runs, folder, given["report"].get("title")))))
