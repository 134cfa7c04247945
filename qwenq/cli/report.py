"""``qwenq report``: run folders in; a model card, a page, and data out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenq.cli.app import app


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of qwenq eval, profile or run.")],
    out: Annotated[Path, typer.Option(help="Folder to write, e.g. reports/NAME.")],
    title: Annotated[str | None, typer.Option(help="Heading. [default: the models' names]")] = None,
) -> None:
    """Write the model card's tables, one page and plots.

    Reads run folders only: nothing is measured, no model is loaded.
    """
    from qwenq.errors import visible
    from qwenq.reporting.write import write_report

    typer.echo(visible(str(write_report(runs, out, title))))
