"""``qwenq run``: all steps of a recipe."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.printing import note, stop_notice
from qwenq.errors import visible
from qwenq.events import Event, Notice, Start

if TYPE_CHECKING:
    from qwenq.run.chain import Chain


@app.command()
def run(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe: a TOML file, or the name of one that ships with qwenq: demo.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id, instead of the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME of the recipe]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps and exit.")] = False,
) -> None:
    """Quantise, evaluate, profile, report and gate as a recipe says.

    The same command goes on where it was stopped or failed: finished steps are not repeated, and an
    interrupted step is resumed. Exit codes of the gate as in `qwenq compare`.
    """
    from qwenq.cli.recipe import checked
    from qwenq.run.chain import chain_of, find_recipe
    from qwenq.run.execute import run_chain

    recipe = find_recipe(recipe)
    chosen = checked(recipe)
    if model is not None:
        chosen = chosen.override({"model": model}, report={"name": _report_name(model)})
    chain = chain_of(chosen, recipe, out)
    _show(chain)
    if dry_run:
        return
    with stop_notice("finished steps are kept"):
        code = run_chain(chain, _show_event)
    if code:
        raise typer.Exit(code)
    if chain.page is not None:
        typer.echo(visible(str(chain.page)))


def _show_event(event: Event) -> None:
    if isinstance(event, Start):
        typer.secho(f"step {event.done + 1} of {event.total}: {event.step}", bold=True, err=True)
    elif isinstance(event, Notice):
        typer.secho(f"note: {event.text}", bold=True, err=True)


def _report_name(model: str) -> str:
    """Return the model's name; where a recipe cannot have it, its valid characters and a hash."""
    from qwenq.models.identity import folder_name
    from qwenq.results import plain_name

    name = plain_name(folder_name(Path(model)))
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return name
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "model"
    return f"{kept}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:6]}"


def _show(chain: Chain) -> None:
    """Print the steps with their commands, and which are done."""
    from qwenq.run.execute import is_done

    count = len(chain.steps)
    typer.echo(f"{count} step{'' if count == 1 else 's'}; run folder {visible(str(chain.work))}", err=True)
    for number, step in enumerate(chain.steps, 1):
        mark = "done" if is_done(chain, step) else ""
        typer.echo(f"{number:>3}  {mark:<5} {step.name}", err=True)
        if not step.records:
            typer.echo(f"           qwenq {visible(shlex.join(step.arguments))}", err=True)
    baseline = chain.recipe.gate.baseline
    if baseline is not None and not Path(baseline).is_dir():
        note(f"there is no baseline {visible(baseline)} yet, so the last step will fail")
