"""Run all steps of a recipe (``qwenq run``), check recipes and list their settings (``qwenq recipe``)."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli import completion
from qwenq.cli.app import app
from qwenq.cli.next import next_commands, with_model
from qwenq.cli.options import Given, recipe_options
from qwenq.cli.printing import stop_notice
from qwenq.errors import visible
from qwenq.events import Event, Notice, Start
from qwenq.progress import note

if TYPE_CHECKING:
    from qwenq.workflow import Chain


@app.command()
@recipe_options("gate.baseline", "gate.fail_on", "--reports=report.folder")
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Recipe: a TOML file, or the name of one that ships with qwenq: demo.",
            autocompletion=completion.recipes,
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id, instead of the recipe's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/NAME of the recipe]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the steps and exit.")] = False,
    *,
    given: Given,
) -> None:
    """Quantise, evaluate, profile, report and gate as a recipe says.

    The same command goes on where it was stopped or failed: finished steps are not repeated, and an
    interrupted step is resumed. Exit codes of the gate are those of `qwenq compare`; its verdict is gate.md
    in the run folder, for a pull request, and gate.xml.
    """
    from qwenq.recipe import read_recipe
    from qwenq.reporting.gate import asked_by
    from qwenq.workflow import find_recipe, run_steps, steps_of

    recipe = find_recipe(recipe)
    asked_by(given["gate"].get("fail_on"))
    chosen = read_recipe(recipe).override(gate=given["gate"], report=given["report"])
    if model is not None:
        chosen = chosen.override({"model": model}, report={"name": _report_name(model)})
    chain = steps_of(chosen, recipe, out)
    _show(chain, commands=dry_run)
    if dry_run:
        return
    with stop_notice("finished steps are kept"):
        code = run_steps(chain, _show_event)
    if code:
        raise typer.Exit(code)
    if chain.page is not None:
        typer.echo(visible(str(chain.page)))
    if made := [step.alias or step.makes for step in chain.steps if step.whole]:
        next_commands(*(words for words in with_model(made[-1]) if words[0] in ("chat", "vllm")))


def _show_event(event: Event) -> None:
    if isinstance(event, Start):
        typer.secho(f"step {event.done + 1} of {event.total}: {event.step}", bold=True, err=True)
    elif isinstance(event, Notice):
        typer.secho(f"note: {event.text}", bold=True, err=True)


def _report_name(model: str) -> str:
    """Return the model's name; where a recipe cannot have it, its valid characters and a hash."""
    from qwenq.models.identity import folder_name

    name = folder_name(Path(model))
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        return name
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "model"
    return f"{kept}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:6]}"


def _show(chain: Chain, *, commands: bool) -> None:
    """Print the steps and which are done; with their commands, which are long, where asked for."""
    from qwenq.workflow import is_done

    count = len(chain.steps)
    typer.echo(f"{count} step{'' if count == 1 else 's'}; run folder {visible(str(chain.work))}", err=True)
    for number, step in enumerate(chain.steps, 1):
        mark = "done" if is_done(chain, step) else ""
        typer.echo(f"{number:>3}  {mark:<5} {step.name}", err=True)
        if commands:
            typer.echo(f"           qwenq {visible(shlex.join(step.arguments))}", err=True)
    baseline = chain.recipe.gate.baseline
    if baseline is not None and not Path(baseline).is_dir():
        note(f"there is no baseline {visible(baseline)} yet, so the last step will fail")


# ``qwenq recipe``: check recipe files, and list their settings.


recipe_app = typer.Typer(
    help="Check recipes, and list their settings.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(recipe_app, name="recipe")


@recipe_app.callback()
def recipe() -> None:
    """Check recipes, and list their settings."""


@recipe_app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Recipes: TOML files.", metavar="FILE...")],
) -> None:
    """Check recipes and show their steps, without running them."""
    from qwenq.recipe import read_recipe
    from qwenq.workflow import find_recipe, steps_of

    for file in map(find_recipe, files):
        chain = steps_of(read_recipe(file), file)
        typer.echo(f"{file}: {', '.join(step.name for step in chain.steps)}")


@recipe_app.command()
def settings() -> None:
    """List all settings with their defaults, as Markdown."""
    from qwenq.recipe import markdown_table

    typer.echo(markdown_table())
