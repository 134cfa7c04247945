"""``qwenq quantize``: a model in, a checked GPTQ checkpoint out."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli.app import app
from qwenq.cli.options import DeviceName, Given, Quiet, recipe_options
from qwenq.cli.printing import next_commands
from qwenq.models.local_path import local_path
from qwenq.stopping import Terminated

if TYPE_CHECKING:
    from qwenq.quantize import Quantised
    from qwenq.recipe import CalibrationRecipe, Recipe


@app.command()
@recipe_options(
    "quantize.bits",
    "quantize.group_size",
    "--calibration=calibration.source",
    "calibration.samples",
    "calibration.seq_len",
    "weights",
    "quantize.*",
)
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder or hub id, e.g. Qwen/Qwen2.5-0.5B-Instruct. [default: the bundled model]"
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe: a TOML file of settings; options given here win over it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. [default: NAME-GPTQ-IntBITS]")] = None,
    device: DeviceName = "auto",
    *,
    given: Given,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run of the same settings.")] = True,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events and result as JSON lines.")] = False,
) -> None:
    """Quantise a model with GPTQ to Int4 or Int8, and check it.

    The result is read back from the disk and compared with the base before it gets its name. Under torchrun
    all processes work on the one model.
    """
    from qwenq.cli.quantize_output import quantize_listener
    from qwenq.distributed import assembled

    chosen = _recipe(recipe, model, given)
    try:
        with assembled(device) as team:
            if not team.leads:
                from qwenq.gptq.ranks import follow

                follow(chosen, team, device)
                return
            with quantize_listener(as_json=as_json, quiet=quiet) as listener:
                try:
                    from qwenq.quantize import quantize as run

                    result = run(chosen, out, listener, device=device, resume=resume, team=team)
                except KeyboardInterrupt:  # SIGTERM too
                    listener.interrupted()
                    raise
                listener.finished(result)
    except Terminated as stop:  # by a signal that only another process may have had
        raise typer.Exit(128 + signal.SIGTERM) from stop
    if not as_json:
        _show_next(result, chosen, out)


def _show_next(result: Quantised, recipe: Recipe, out: Path | None) -> None:
    folder = out or Path(result.folder.name)
    if recipe.weights == "random":
        next_commands(("profile", folder))
        return
    base = recipe.model or "bundled"
    next_commands(("chat", folder), ("eval", base, folder), ("profile", base, folder))


def _recipe(file: Path | None, model: str | None, given: Given) -> Recipe:
    """Return the recipe file, if any, with the command line's options on top."""
    from qwenq.recipe import Recipe, read_recipe

    base = read_recipe(file) if file else Recipe()
    if source := given["calibration"].get("source"):
        base = replace(base, calibration=_for_source(base.calibration, source))
    top = {**given.pop(""), "model": model}
    return base.override(top, **given)


def _for_source(calibration: CalibrationRecipe, source: str) -> CalibrationRecipe:
    """Drop those of a recipe's settings that describe its own source, and that the given one cannot have."""
    changes: dict[str, Any] = {}
    if Path(source).suffix == ".safetensors":  # a saved set has its own sizes
        changes |= {"samples": "auto", "seq_len": "auto", "column": None}
    if source == "self" or local_path(source, "--calibration").is_file():
        changes["split"] = None
    if source == "self":
        changes["column"] = None
    return replace(calibration, **changes)
