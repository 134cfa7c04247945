"""``qwenq recipe``: check recipe files, and list their settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.errors import UsageError

if TYPE_CHECKING:
    from qwenq.recipe import Recipe

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
    from qwenq.run.chain import chain_of, find_recipe

    for file in map(find_recipe, files):
        chain = chain_of(checked(file), file)
        typer.echo(f"{file}: {', '.join(step.name for step in chain.steps)}")


@recipe_app.command()
def settings() -> None:
    """List all settings with their defaults, as Markdown."""
    from qwenq.recipe import markdown_table

    typer.echo(markdown_table())


def checked(file: Path) -> Recipe:
    """Return the recipe, with its conditions parsed and the files that it names found.

    Raises:
        UsageError: a key, a value, a condition or a task that is wrong, or a file that is not there.
    """
    from qwenq.recipe import read_recipe
    from qwenq.reporting.gate import asked_by

    found = read_recipe(file)
    try:
        asked_by(found.gate.fail_on)
    except UsageError as error:
        error.where = f"{file}, gate.fail_on"
        raise
    for key, name in (
        ("calibration.source", found.calibration.source),
        ("eval.data", found.eval.data if found.eval else None),
    ):
        if name is not None and _is_path(name) and not Path(name).expanduser().exists():
            raise UsageError(
                f"{key} = {name!r}: no such file or folder",
                where=file,
                hint="paths in a recipe are taken from the folder that qwenq is started in",
            )
    if found.eval is not None:
        from qwenq.evals.tasks.registry import get_task, protocol_names

        for task in found.eval.tasks:
            protocol = found.eval.protocol
            get_task(task, protocol_names(task)[0] if protocol == "auto" else protocol)
    return found


def _is_path(name: str) -> bool:
    """Return whether it is a path, not a word such as ``self`` or the ``owner/name`` of a hub dataset."""
    return name.startswith((".", "/", "~")) or Path(name).suffix != "" or name.count("/") > 1
