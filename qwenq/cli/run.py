"""``qwenq run``: a recipe from beginning to end."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.printing import typed_command
from qwenq.errors import visible
from qwenq.events import Event, Notice, Start

if TYPE_CHECKING:
    from qwenq.run.chain import Chain


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="TOML file, or a recipe of qwenq's own such as demo.")],
    model: Annotated[str | None, typer.Option(help="Instead of the recipe's: folder or hub id.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps, do nothing.")] = False,
) -> None:
    """Quantise, evaluate, profile, report, gate, as a recipe says.

    Stopped or failed? The same command goes on where it was: steps that are done are not done again, and a
    step that was interrupted goes on itself. Exit codes of the gate as in `qwenq compare`.
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
    try:
        code = run_chain(chain, _show_event)
    except KeyboardInterrupt:
        command = typed_command()
        typer.echo(f"\nstopped; the same command goes on where it stopped: {command}", err=True)
        raise
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
    """The model's own; where a recipe could not have it, what it could, with a hash: two models are two."""
    from qwenq.models.identity import folder_name
    from qwenq.results import plain_name

    name = plain_name(folder_name(Path(model)))
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return name
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "model"
    return f"{kept}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:6]}"


def _show(chain: Chain) -> None:
    """What is done, and what will be, with the commands."""
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
        typer.echo(
            f"note: there is no baseline {visible(baseline)} yet, so the last step will fail", err=True
        )
