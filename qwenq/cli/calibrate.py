"""``qwenq calibrate``: make the token sequences once, so that several quantisations share them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import ThinkingWish
from qwenq.errors import CalibrationError, CorruptFileError, UsageError
from qwenq.models.local_path import local_path

if TYPE_CHECKING:
    from qwenq.calibration import CalibrationSet
    from qwenq.models.tokenizer import Tokenizer

_PREVIEW = 80
_TEMPLATES = {
    "plain": "",
    "chat": " (chat template applied)",
    "mixed": " (chat template applied to its conversations)",
    "self": " (text that the model wrote)",
    "random": " (drawn evenly from the vocabulary)",
}


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub id. Nothing: the bundled model.")
    ] = None,
    weights: Annotated[
        Literal["stored", "random"],
        typer.Option(help="random: MODEL is a catalogue name; writes random tokens of its vocabulary."),
    ] = "stored",
    source: Annotated[
        str,
        typer.Option(
            help="self (the model writes its own text), a file (text, JSON, CSV, parquet; also compressed), "
            "a folder of such files or of save_to_disk, or a hub dataset owner/name[:config]."
        ),
    ] = "self",
    samples: Annotated[int | None, typer.Option(help="Calibration sequences. Default: 32.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence. Default: 512.")] = None,
    held_out: Annotated[
        int | None, typer.Option(help="Sequences kept apart for the check afterwards. Default: 8.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the documents, or the text.")] = 0,
    split: Annotated[
        str | None, typer.Option(help="Split of a hub dataset or a folder. Default: train.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Key to read. Default: the first of text, messages, conversations."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where `self` runs the model: auto, cpu, cuda, cuda:1, …")
    ] = "auto",
    thinking: ThinkingWish = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a different file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Write calibration tokens once, to share between quantisations.

    One safetensors file that holds the tokens and their manifest.
    """
    _require_writable_name(out)
    options: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "held_out": held_out, "seed": seed}
    options |= {"split": split, "column": column}
    if weights == "random":
        made, tokenizer = _random(model, source, **options), None
    else:
        made, tokenizer = _make(model, source, device, thinking, **options)
    kept = None if force else _there_already(made, out)
    if kept is None:
        made.save(out)
    for notice in made.manifest.notices:
        typer.echo(notice, err=True)
    shown = kept or made  # the same tokens, whatever they were read from then
    if as_json:
        typer.echo(shown.manifest.model_dump_json(indent=2))
        return
    first = made.tokens[0, : 2 * _PREVIEW].tolist()
    preview = tokenizer.decode(first)[:_PREVIEW] if tokenizer else " ".join(map(str, first))[:_PREVIEW]
    typer.echo(_describe(shown, out, preview, kept is not None))


def _make(
    model: str | None, source: str, device: str, thinking: str, **options: Any
) -> tuple[CalibrationSet, Tokenizer]:
    from qwenq.calibration import load_calibration
    from qwenq.calibration.choose import calibration_tokenizer
    from qwenq.cli.progress import show_progress
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.precision import resolve_device
    from qwenq.models.resolve import resolve_model

    place = str(resolve_device(device))
    resolved = resolve_model(model)
    checkpoint = open_checkpoint(resolved.folder)
    tokenizer = calibration_tokenizer(resolved.folder, thinking)
    for notice in (*resolved.notices, *checkpoint.notices):
        typer.echo(notice, err=True)
    with show_progress("writing text" if source == "self" else "reading text") as progress:
        made = load_calibration(
            source, checkpoint=checkpoint, tokenizer=tokenizer, device=place, progress=progress, **options
        )
    return made, tokenizer


def _random(
    model: str | None,
    source: str,
    *,
    seed: int,
    split: str | None,
    column: str | None,
    **sizes: int | None,
) -> CalibrationSet:
    """Tokens for a model with random weights, which can write no text and has no tokenizer to read one."""
    from qwenq.calibration.load import wanted_sizes
    from qwenq.calibration.random_tokens import random_tokens
    from qwenq.models.opening import open_model

    for option, given in (("--source", source != "self"), ("--split", split), ("--column", column)):
        if given:
            raise UsageError(
                "a model with random weights has no tokenizer to read a text",
                where=option,
                hint=f"leave {option} out: the tokens are random, too",
            )
    checkpoint = open_model(model, "random", seed)
    for notice in checkpoint.notices:
        typer.echo(notice, err=True)
    wanted = wanted_sizes(checkpoint, **sizes)
    return random_tokens(int(checkpoint.config["vocab_size"]), wanted, seed)


def _require_writable_name(out: Path) -> None:
    """Refuse a name that could not be saved to, before any work."""
    if local_path(out, "--out").is_dir():
        raise UsageError("--out is a folder", where=out, hint=f"name a file: {out / 'calib.safetensors'}")
    if out.suffix != ".safetensors":
        raise UsageError("--out has to end in .safetensors", where=out, hint=f"{out.stem}.safetensors")


def _there_already(made: CalibrationSet, out: Path) -> CalibrationSet | None:
    """What ``out`` holds, if it is these very tokens; a file that holds anything else is not overwritten."""
    if not out.exists():
        return None
    try:
        there = made.load(out)
    except (CalibrationError, CorruptFileError):
        there = None
    if there is None or there.fingerprint != made.fingerprint:
        raise UsageError(
            "the output file is there and holds something else",
            where=out,
            hint="name another --out, or overwrite it with --force",
        )
    return there


def _describe(made: CalibrationSet, out: Path, preview: str, kept: bool) -> str:
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
        "file": f"{out}{' (was there already, unchanged)' if kept else ''}",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items() if value is not None)


def _where_it_stopped(made: CalibrationSet) -> str:
    return "" if made.manifest.source_read_to_end else ", the rest of the source was left unread"
