"""Rewrite a model folder in another layout (``qwenq convert``); measure a tokenizer (``qwenq tokenizer``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwenq.cli import completion
from qwenq.cli.app import app
from qwenq.cli.next import named_base, next_commands, with_model
from qwenq.cli.options import Quiet, RandomSeed, Verbose
from qwenq.cli.printing import columns, print_json, table_console
from qwenq.cli.progress import with_details
from qwenq.errors import UsageError
from qwenq.models.folders import local_path
from qwenq.progress import StepListener, note

if TYPE_CHECKING:
    from qwenq.models.tokenizer import Tokenizer

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@app.command()
def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="Model folder or hub id; Qwen v1 or newer, GPTQ or not.", autocompletion=completion.models
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="New or empty folder.")],
    zeros: Annotated[
        Literal["v1", "v2"] | None,
        typer.Option(help="Format of GPTQ zero points: v1 (minus one) or v2."),
    ] = None,
    to: Annotated[
        Literal["compressed-tensors"] | None,
        typer.Option(
            help="compressed-tensors: the same integers in that layout, which transformers and vLLM load; of "
            "symmetric GPTQ models."
        ),
    ] = None,
    store_head: Annotated[
        bool,
        typer.Option(
            "--store-head",
            help="Store the embedding also as lm_head.weight of a model whose head is tied: auto-gptq 0.7 "
            "takes a head that is not stored for zeros.",
        ),
    ] = False,
    max_shard: Annotated[str, typer.Option(help="Largest size of a file: 5GB, 500MB, 2GiB.")] = "5GB",
    weights: Annotated[
        Literal["stored", "random"],
        typer.Option(help="random: SRC is a catalogue name; writes it with seeded random weights."),
    ] = "stored",
    seed: RandomSeed = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rewrite a model in another layout.

    Qwen v1 to Qwen2, GPTQ zero points v1 ↔ v2, GPTQ to compressed-tensors, shards of another size.
    """
    shard_bytes = parse_size(max_shard)
    if weights == "random":
        of_folders = {"--zeros": zeros, "--to": to, "--store-head": store_head}
        _write_random(src, dst, seed, shard_bytes, of_folders)
        return
    from qwenq import api
    from qwenq.models.opening import resolve_model
    from qwenq.storage import readable_bytes

    with StepListener(quiet=quiet) as plain, with_details(plain, verbose) as listener:
        done = api.convert(
            src,
            dst,
            zeros=zeros,
            to=to,
            store_head=store_head,
            max_shard_bytes=shard_bytes,
            progress=listener,
        )
    for change in done.changes or ["nothing but the shards changed"]:
        typer.echo(f"changed: {change}")
    files = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    typer.echo(f"wrote {done.folder}: {done.tensors} tensors, {readable_bytes(done.total_bytes)} in {files}")
    next_commands(*with_model(dst, named_base(resolve_model(src).folder)))


def _write_random(
    name: str, dst: Path, seed: int, shard_bytes: int, of_folders: Mapping[str, object]
) -> None:
    """Write a catalogue model with random weights to a folder."""
    from qwenq.models.bundled import is_bundled
    from qwenq.models.catalogue import BUNDLED
    from qwenq.models.random_weights import write_random_checkpoint
    from qwenq.storage import readable_bytes

    for option, given in of_folders.items():
        if given:
            hint = f"leave {option} out; convert what this writes, or what `qwenq quantize` makes of it"
            raise UsageError("random weights are written in one layout", where=option, hint=hint)
    made = write_random_checkpoint(BUNDLED if is_bundled(name) else name, dst, seed, max_bytes=shard_bytes)
    names = list(made.names())
    size = readable_bytes(sum(made.info(name).nbytes for name in names))
    typer.echo(
        f"wrote {dst}: {len(names)} tensors, {size}, random weights (seed {seed}): for speed and memory"
    )
    next_commands(*with_model(dst))


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


# ``qwenq tokenizer``: statistics of a tokenizer on text files.


tokenizer_app = typer.Typer(help="Measure a tokenizer.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.callback()
def tokenizer() -> None:
    """Measure a tokenizer."""


@tokenizer_app.command()
def stats(
    files: Annotated[list[Path], typer.Argument(help="UTF-8 text files.", metavar="FILE...")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Model folder or hub id, or a .tiktoken or tokenizer.json file. [default: bundled]",
            metavar="MODEL",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the bytes per token of text files."""
    texts = [(file, *read_text(file)) for file in files]
    reader, source = _open(tokenizer)
    rows = [_row(str(file), size, text, reader) for file, size, text in texts]
    counts = ("bytes", "characters", "tokens")
    total: dict[str, Any] = {"file": "total", **{key: sum(row[key] for row in rows) for key in counts}}
    for row in (*rows, total):
        row["bytes_per_token"] = round(row["bytes"] / row["tokens"], 4)
    if as_json:
        about = {"source": source, "fingerprint": reader.fingerprint, "vocab_size": reader.vocab_size}
        print_json({"tokenizer": about, "files": rows, "total": total})
    else:
        _print(rows if len(rows) == 1 else [*rows, total])


def read_text(file: Path) -> tuple[int, str]:
    """Return the size in bytes and the text of a UTF-8 file, with its line ends unchanged.

    Raises:
        UsageError: no such file, a folder, an empty file, or bytes that are not UTF-8 (with the offset).
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"the file cannot be read: {error.strerror}", where=file) from error
    if not content:
        raise UsageError("the file is empty", where=file, hint="give a file with text")
    try:
        return len(content), content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} ({error.reason})",
            where=file,
            hint="convert it first, e.g. with iconv -t utf-8",
        ) from error


def _open(tokenizer: str | None) -> tuple[Tokenizer, str]:
    """Return the tokenizer and its path; None means the bundled model's."""
    from qwenq.models.opening import resolve_model
    from qwenq.models.tokenizer import load_tokenizer

    if tokenizer is not None and (file := local_path(tokenizer, "--tokenizer")).is_file():
        return load_tokenizer(file), tokenizer
    resolved = resolve_model(tokenizer)
    said = resolved.notices if tokenizer is not None else ["no --tokenizer given: using the bundled model's"]
    for line in said:
        note(line)
    return load_tokenizer(resolved.folder), str(resolved.folder)


def _row(name: str, size: int, text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = len(tokenizer.encode(text))
    if not tokens:
        raise UsageError("this tokenizer gives no tokens for the text", where=name, hint="give another text")
    return {"file": name, "bytes": size, "characters": len(text), "tokens": tokens}


def _print(rows: list[dict[str, Any]]) -> None:
    counts = ("bytes", "characters", "tokens")
    lines = [
        (row["file"], *(f"{row[key]:,}" for key in counts), f"{row['bytes_per_token']:.2f}") for row in rows
    ]
    table_console(120).print(columns(("file", *counts, "bytes/token"), lines))
