"""Quantise a model (``qwenq quantize``), and write calibration tokens to share (``qwenq calibrate``)."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli import completion
from qwenq.cli.app import app
from qwenq.cli.next import next_commands, with_model
from qwenq.cli.options import DeviceName, Given, ModelArgument, Quiet, Verbose, recipe_options
from qwenq.cli.progress import quantize_listener, with_details
from qwenq.progress import StepListener
from qwenq.stopping import Terminated

if TYPE_CHECKING:
    from qwenq.calibration import CalibrationSet


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
    model: ModelArgument = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe: a TOML file, or the name of one that ships with qwenq; options win over it.",
            autocompletion=completion.recipes,
        ),
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
    from qwenq import api
    from qwenq.distributed import process_group

    top = {**given[""], "model": model}
    chosen = api.chosen_recipe(recipe, top, given["calibration"], given["quantize"])
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
        base = None if chosen.weights == "random" else chosen.model or "bundled"
        next_commands(*with_model(out or Path(result.folder.name), base))


# ``qwenq calibrate``: make the token sequences once, so that several quantisations share them.


_PREVIEW = 80
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
    model: ModelArgument = None,
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
    from qwenq import api
    from qwenq.models.folders import local_path
    from qwenq.models.opening import resolve_model
    from qwenq.models.tokenizer import load_tokenizer

    existed = local_path(out, "--out").exists() and not force
    wanted = {**given[""], **given["calibration"], **given["quantize"]}
    with StepListener(quiet=quiet) as plain, with_details(plain, verbose) as listener:
        made = api.calibrate(model, out, **wanted, device=device, force=force, progress=listener)
    if as_json:
        typer.echo(made.manifest.model_dump_json(indent=2))
        return
    random = wanted.get("weights") == "random"
    first = made.tokens[0, : 2 * _PREVIEW].tolist()
    if random:
        preview = " ".join(map(str, first))
    else:
        preview = load_tokenizer(resolve_model(model).folder).decode(first)
    typer.echo(_describe(made, out, preview[:_PREVIEW], unchanged=existed))
    next_commands(("quantize", model, *(("--weights", "random") if random else ()), "--calibration", out))


def _describe(made: CalibrationSet, out: Path, preview: str, *, unchanged: bool) -> str:
    facts = made.manifest
    rest = "" if facts.source_read_to_end else ", the rest of the source was not read"
    lines = {
        "source": f"{facts.source}{_TEMPLATES[facts.template]}",
        "sequences": f"{facts.samples} × {facts.seq_len} tokens = {made.tokens.numel():,}",
        "held out": f"{facts.held_out} × {facts.seq_len}, from {facts.held_out_from}",
        "documents": f"{facts.documents:,} used of {facts.documents_read:,} read{rest}"
        if facts.documents is not None and facts.documents_read is not None
        else None,
        "seed": str(facts.seed),
        "fingerprint": facts.tokens,
        "begins": repr(preview),
        "file": f"{out}{' (existed, unchanged)' if unchanged else ''}",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items() if value is not None)
