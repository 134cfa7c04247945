"""``qwenq recipe``: recipes as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.errors import UsageError

if TYPE_CHECKING:
    from qwenq.recipe import Recipe

recipe_app = typer.Typer(help="Recipes as files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipe_app, name="recipe")


@recipe_app.callback()
def recipe() -> None:
    """Recipes as files."""


@recipe_app.command()
def check(files: Annotated[list[Path], typer.Argument(help="TOML files.", metavar="FILE...")]) -> None:
    """Say whether recipes are sound, and the steps they ask for.

    Nothing is run.
    """
    from qwenq.run.chain import chain_of, find_recipe

    for file in map(find_recipe, files):
        chain = chain_of(checked(file), file)
        typer.echo(f"{file}: {', '.join(step.name for step in chain.steps)}")


def checked(file: Path) -> Recipe:
    """The recipe, with its conditions parsed and the files that it names found.

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
        from qwenq.evals.tasks.registry import get_task

        for task in found.eval.tasks:
            get_task(task, found.eval.protocol)
    return found


def _is_path(name: str) -> bool:
    """Unless it is a word such as ``self``, or the ``owner/name`` of a hub dataset."""
    return name.startswith((".", "/", "~")) or Path(name).suffix != "" or name.count("/") > 1
