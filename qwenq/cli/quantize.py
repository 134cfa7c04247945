"""``qwenq quantize``: a model in, a checked GPTQ checkpoint out."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import DeviceName, RecipeCommand
from qwenq.errors import UsageError
from qwenq.models.local_path import local_path
from qwenq.models.opening import WEIGHTS_HELP
from qwenq.stopping import Terminated

if TYPE_CHECKING:
    from qwenq.distributed import Team
    from qwenq.recipe import CalibrationRecipe, Recipe


@app.command(cls=RecipeCommand)
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder or hub id, e.g. Qwen/Qwen2.5-0.5B-Instruct. Nothing: the bundled model."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8.")] = None,
    group_size: Annotated[
        str | None, typer.Option(help="auto, 32, 64, 128, or -1 for one scale per row.")
    ] = None,
    pad_ffn: Annotated[
        str | None,
        typer.Option(
            metavar="auto|WIDTH",
            help="Widen the MLP with zero channels, so that more GPUs can share its groups; auto: as `qwenq "
            "plan` advises. The outputs stay the same.",
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS_HELP)] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self (the model writes its own text), a file or folder of text, JSON, CSV or parquet, a "
            "set made by `qwenq calibrate`, or a hub dataset."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences; auto: 48 on CPU, 128 on a GPU.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens each; auto: 256 on CPU, 2048 on a GPU.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file; options given here win over it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make. [default: NAME-GPTQ-Int4]")] = None,
    device: DeviceName = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the forward pass: auto, float32, bfloat16, float16."),
    ] = None,
    module_bits: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=BITS for linear layers whose names hold the pattern: 4, 8, or 16 to leave them as "
            "they are; may be repeated, the first match counts."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the calibration text.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run of the same settings.")] = True,
    sym: Annotated[
        bool | None,
        typer.Option("--sym/--asym", help="Zero point fixed in the middle, or free."),
    ] = None,
    act_order: Annotated[str | None, typer.Option(help="static or none.")] = None,
    scale_search: Annotated[str | None, typer.Option(help="hessian, mse or none.")] = None,
    damp: Annotated[float | None, typer.Option(help="Share of the Hessian's mean diagonal.")] = None,
    refine: Annotated[
        bool | None,
        typer.Option("--refine/--no-refine", help="Descend further on GPTQ's objective."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Events and the result as JSON lines.")] = False,
) -> None:
    """Quantise a model with GPTQ to Int4 or Int8, and check it.

    Success is said only about what was read back from the disk and compared with the base. Under torchrun all
    its processes work on the one model.
    """
    chosen = _recipe(
        recipe,
        {"model": model, "weights": weights},
        calibration={"source": calibration, "samples": samples, "seq_len": seq_len},
        quantize={
            "bits": bits,
            "group_size": _group_size(group_size),
            "pad_ffn": _width(pad_ffn),
            "module_bits": _module_bits(module_bits),
            "dtype": dtype,
            "seed": seed,
            "sym": sym,
            "act_order": act_order,
            "scale_search": scale_search,
            "damp": damp,
            "refine": refine,
        },
    )
    from qwenq.distributed import assembled

    try:
        with assembled(device) as team:
            if team.leads:
                _lead(chosen, out, "json" if as_json else "text", device, resume=resume, team=team)
            else:
                from qwenq.gptq.ranks import follow

                follow(chosen, team, device)
    except Terminated as stop:  # by a signal that another process may have had, and this one not
        raise typer.Exit(128 + signal.SIGTERM) from stop


def _lead(
    recipe: Recipe, out: Path | None, form: Literal["text", "json"], device: str, *, resume: bool, team: Team
) -> None:
    """Quantise, and show it."""
    from qwenq.cli.quantize_output import listener_for

    with listener_for(form) as listener:
        try:
            from qwenq.quantize import quantize as run

            result = run(recipe, out, listener, device=device, resume=resume, team=team)
        except KeyboardInterrupt:  # SIGTERM too
            listener.interrupted()
            raise
        listener.finished(result)


def _recipe(file: Path | None, top: dict[str, str | None], **sections: dict[str, Any]) -> Recipe:
    """The recipe file, if any, with the command line's options on top."""
    from qwenq.recipe import Recipe, read_recipe

    base = read_recipe(file) if file else Recipe()
    if source := sections["calibration"]["source"]:
        base = base.model_copy(update={"calibration": _for_source(base.calibration, source)})
    return base.override(top, **sections)


def _for_source(calibration: CalibrationRecipe, source: str) -> CalibrationRecipe:
    """What a recipe says of its own source, less what another one, named by an option, cannot have."""
    changes: dict[str, Any] = {}
    if Path(source).suffix == ".safetensors":  # a saved set has its own sizes
        changes |= {"samples": "auto", "seq_len": "auto", "column": None}
    if source == "self" or local_path(source, "--calibration").is_file():
        changes["split"] = None
    if source == "self":
        changes["column"] = None
    return calibration.model_copy(update=changes)


def _group_size(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    return _whole(text, "group size", "--group-size", "use auto, 32, 64, 128 or -1")


def _module_bits(given: list[str] | None) -> dict[str, int] | None:
    if not given:
        return None
    found = {}
    for text in given:
        pattern, _, bits = text.rpartition("=")
        if not pattern:
            raise UsageError(
                f"{text!r} is not PATTERN=BITS", where="--module-bits", hint="like linear_attn=8"
            )
        found[pattern] = _whole(bits, "bits", "--module-bits", "use 4, 8 or 16")
    return found


def _width(text: str | None) -> int | str | None:
    if text is None or text in ("auto", "none"):
        return text
    return _whole(text, "FFN width", "--pad-ffn", "use auto, or the width that `qwenq plan` advises")


def _whole(text: str, what: str, option: str, hint: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"{what} {text!r}", where=option, hint=hint) from error
