"""``qwenq convert``: rewrite a model folder in another layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import Quiet, RandomSeed
from qwenq.cli.printing import next_commands, notes
from qwenq.cli.progress import show_events
from qwenq.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="Model folder or hub id; Qwen v1 or newer, GPTQ or not.")],
    dst: Annotated[Path, typer.Argument(help="New or empty folder.")],
    zeros: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="Format of GPTQ zero points: v1 (minus one) or v2."),
    ] = None,
    max_shard: Annotated[str, typer.Option(help="Largest size of a file: 5GB, 500MB, 2GiB.")] = "5GB",
    weights: Annotated[
        Literal["stored", "random"],
        typer.Option(help="random: SRC is a catalogue name; writes it with seeded random weights."),
    ] = "stored",
    seed: RandomSeed = 0,
    quiet: Quiet = False,
) -> None:
    """Rewrite a model in another layout.

    Qwen v1 to Qwen2, GPTQ zero points v1 ↔ v2, shards of another size.
    """
    shard_bytes = parse_size(max_shard)
    if weights == "random":
        _write_random(src, dst, seed, shard_bytes, zeros)
        return
    from qwenq.convert import convert as run
    from qwenq.models.resolve import resolve_model
    from qwenq.storage import readable_bytes

    resolved = resolve_model(src)
    found = list(resolved.notices)
    with show_events(found.append, quiet=quiet) as listener:
        done = run(resolved.folder, dst, zeros=zeros, max_shard_bytes=shard_bytes, listener=listener)
    notes(found)
    for change in done.changes or ["nothing but the shards changed"]:
        typer.echo(f"changed: {change}")
    files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    typer.echo(f"wrote {done.folder}: {done.tensors} tensors, {readable_bytes(done.total_bytes)} in {files}")
    next_commands(("chat", dst), ("eval", dst))


def _write_random(name: str, dst: Path, seed: int, shard_bytes: int, zeros: str | None) -> None:
    """Write a catalogue model with random weights to a folder."""
    from qwenq.models.random_weights import write_random_checkpoint
    from qwenq.models.shards import tensor_bytes
    from qwenq.storage import readable_bytes

    if zeros is not None:
        hint = "leave --zeros out; `qwenq quantize --weights random` makes a GPTQ model"
        raise UsageError("random weights are not GPTQ weights", where="--zeros", hint=hint)
    made = write_random_checkpoint(name, dst, seed, max_bytes=shard_bytes)
    names = list(made.names())
    size = readable_bytes(sum(tensor_bytes(made.info(name)) for name in names))
    typer.echo(
        f"wrote {dst}: {len(names)} tensors, {size}, random weights (seed {seed}): for speed and memory"
    )
    next_commands(("profile", dst))


def parse_size(text: str) -> int:
    """Return the bytes of ``5GB``, ``500MB`` (powers of 1000), ``2GiB`` (of 1024) or a plain number.

    Raises:
        UsageError: another form, or zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[kmg]i?)b?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size", where="--max-shard", hint="write 5GB, 500MB or 2GiB")
    return size
