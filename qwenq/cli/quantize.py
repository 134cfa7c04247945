"""Quantise a model (``qwenq quantize``), and write calibration tokens to share (``qwenq calibrate``)."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli import completion
from qwenq.cli.app import app
from qwenq.cli.next import next_commands, with_model
from qwenq.cli.options import DeviceName, Given, Quiet, Verbose, recipe_options
from qwenq.cli.printing import note, notes
from qwenq.cli.progress import show_events, with_details
from qwenq.errors import CalibrationError, CorruptFileError, UsageError
from qwenq.events import counted
from qwenq.models.folders import local_path
from qwenq.recipe import Recipe
from qwenq.stopping import Terminated

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenq.calibration import CalibrationSet
    from qwenq.models.tokenizer import Tokenizer
    from qwenq.quantization import Quantised
    from qwenq.recipe import CalibrationRecipe

# ``qwenq quantize``: a model in, a checked GPTQ checkpoint out.


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
            help="Model folder or hub id, e.g. Qwen/Qwen2.5-0.5B-Instruct. [default: the bundled model]",
            autocompletion=completion.models,
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
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print events and result as JSON lines.")] = False,
) -> None:
    """Quantise a model with GPTQ to Int4 or Int8, and check it.

    The result is read back from the disk and compared with the base before it gets its name. Under torchrun
    all processes work on the one model.
    """
    from qwenq.cli.progress import quantize_listener, with_details
    from qwenq.distributed import process_group

    chosen = _recipe(recipe, model, given)
    try:
        with process_group(device) as team:
            if not team.is_rank0:
                from qwenq.gptq.pipeline import run_rank

                run_rank(chosen, team, device)
                return
            with quantize_listener(as_json=as_json, quiet=quiet) as listener:
                try:
                    from qwenq.quantization import quantize as run

                    with with_details(listener, verbose) as detailed:
                        result = run(chosen, out, detailed, device=device, resume=resume, team=team)
                except KeyboardInterrupt:  # SIGTERM too
                    listener.interrupted()
                    raise
                listener.finished(result)
    except Terminated as stop:  # by a signal that only another process may have had
        raise typer.Exit(128 + signal.SIGTERM) from stop
    if not as_json:
        _show_next(result, chosen, out)


def _show_next(result: Quantised, recipe: Recipe, out: Path | None) -> None:
    base = None if recipe.weights == "random" else recipe.model or "bundled"
    next_commands(*with_model(out or Path(result.folder.name), base))


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


# ``qwenq calibrate``: make the token sequences once, so that several quantisations share them.


_PREVIEW = 80
_SIZES = ("samples", "seq_len", "held_out")
_TEMPLATES = {
    "plain": "",
    "chat": " (with the chat template)",
    "mixed": " (with the chat template for its conversations)",
    "self": " (text that the model wrote)",
    "random": " (tokens drawn evenly from the vocabulary)",
}


@app.command()
@recipe_options(
    "weights",
    "calibration.*",
    "quantize.seed",
    defaults={"calibration.samples": "32", "calibration.seq_len": "512"},
)
def calibrate(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model folder or hub id. [default: the bundled model]", autocompletion=completion.models
        ),
    ] = None,
    *,
    given: Given,
    device: DeviceName = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a different file.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write calibration tokens once, to share between quantisations.

    One safetensors file that holds the tokens and their manifest.
    """
    _require_writable_name(out)
    Recipe().override(given[""], calibration=given["calibration"], quantize=given["quantize"])  # in range
    wanted = {"source": "self", **given["calibration"]}
    source, thinking = wanted.pop("source"), wanted.pop("thinking", "auto")
    sizes = {name: None if wanted.get(name) == "auto" else wanted.get(name) for name in _SIZES}
    options = {**wanted, **sizes, "seed": given["quantize"].get("seed", 0)}
    if given[""].get("weights") == "random":
        made, tokenizer = _random(model, source, **options), None
    else:
        label = "writing text" if source == "self" else "reading text"
        with (
            show_events(note, quiet=quiet) as plain,
            with_details(plain, verbose) as listener,
            counted(listener, label, "tokens") as progress,
        ):
            made, tokenizer = _make(model, source, device, thinking, progress, **options)
    kept = None if force else _there_already(made, out)
    if kept is None:
        made.save(out)
    notes(made.manifest.notices)
    shown = kept or made  # the same tokens, from whatever source
    if as_json:
        typer.echo(shown.manifest.model_dump_json(indent=2))
        return
    first = made.tokens[0, : 2 * _PREVIEW].tolist()
    preview = tokenizer.decode(first)[:_PREVIEW] if tokenizer else " ".join(map(str, first))[:_PREVIEW]
    typer.echo(_describe(shown, out, preview, unchanged=kept is not None))
    weights = ("--weights", "random") if tokenizer is None else ()
    next_commands(("quantize", model, *weights, "--calibration", out))


def _make(
    model: str | None,
    source: str,
    device: str,
    thinking: str,
    progress: Callable[[int, int], None],
    **options: Any,
) -> tuple[CalibrationSet, Tokenizer]:
    from qwenq.calibration import load_calibration
    from qwenq.calibration.load import calibration_tokenizer
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import resolve_model

    device = str(resolve_device(device))
    resolved = resolve_model(model)
    checkpoint = open_checkpoint(resolved.folder)
    tokenizer = calibration_tokenizer(resolved.folder, thinking)
    notes([*resolved.notices, *checkpoint.notices])
    made = load_calibration(
        source, checkpoint=checkpoint, tokenizer=tokenizer, device=device, progress=progress, **options
    )
    return made, tokenizer


def _random(
    model: str | None,
    source: str,
    *,
    seed: int,
    split: str | None = None,
    column: str | None = None,
    **sizes: int | None,
) -> CalibrationSet:
    """Draw tokens for a model with random weights, which has no tokenizer to read or write text."""
    from qwenq.calibration.calibration_set import random_tokens
    from qwenq.calibration.load import wanted_sizes
    from qwenq.models.opening import open_model

    for option, given in (("--source", source != "self"), ("--split", split), ("--column", column)):
        if given:
            raise UsageError(
                "a model with random weights has no tokenizer to read a text",
                where=option,
                hint=f"leave {option} out: the tokens are random too",
            )
    checkpoint = open_model(model, "random", seed)
    notes(checkpoint.notices)
    wanted = wanted_sizes(checkpoint, **sizes)
    return random_tokens(int(checkpoint.config["vocab_size"]), wanted, seed)


def _require_writable_name(out: Path) -> None:
    """Refuse a name that could not be saved to, before any work."""
    if local_path(out, "--out").is_dir():
        raise UsageError("--out is a folder", where=out, hint=f"name a file: {out / 'calib.safetensors'}")
    if out.suffix != ".safetensors":
        raise UsageError("--out has to end in .safetensors", where=out, hint=f"{out.stem}.safetensors")


def _there_already(made: CalibrationSet, out: Path) -> CalibrationSet | None:
    """Return what ``out`` holds if it is these very tokens; raise UsageError if it is something else."""
    if not out.exists():
        return None
    try:
        there = made.load(out)
    except (CalibrationError, CorruptFileError):
        there = None
    if there is None or there.fingerprint != made.fingerprint:
        raise UsageError(
            "the output file exists and holds something else",
            where=out,
            hint="name another --out, or overwrite it with --force",
        )
    return there


def _describe(made: CalibrationSet, out: Path, preview: str, *, unchanged: bool) -> str:
    facts = made.manifest
    lines = {
        "source": f"{facts.source}{_TEMPLATES[facts.template]}",
        "sequences": f"{facts.samples} × {facts.seq_len} tokens = {made.tokens.numel():,}",
        "held out": f"{facts.held_out} × {facts.seq_len}, from {facts.held_out_from}",
        "documents": f"{facts.documents:,} used of {facts.documents_read:,} read{_where_it_stopped(made)}"
        if facts.documents is not None and facts.documents_read is not None
        else None,
        "seed": str(facts.seed),
        "fingerprint": facts.tokens,
        "begins": repr(preview),
        "file": f"{out}{' (existed, unchanged)' if unchanged else ''}",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items() if value is not None)


def _where_it_stopped(made: CalibrationSet) -> str:
    return "" if made.manifest.source_read_to_end else ", the rest of the source was not read"
