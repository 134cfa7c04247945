"""``qwenq tokenizer``: statistics of a tokenizer on text files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli.app import app
from qwenq.cli.printing import note, notes, print_json, table_console
from qwenq.errors import UsageError
from qwenq.models.local_path import local_path

if TYPE_CHECKING:
    from qwenq.models.tokenizer import Tokenizer

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
    total = _total(rows)
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
    from qwenq.models.resolve import resolve_model
    from qwenq.models.tokenizer import load_tokenizer

    if tokenizer is not None and (file := local_path(tokenizer, "--tokenizer")).is_file():
        return load_tokenizer(file), tokenizer
    resolved = resolve_model(tokenizer)
    if tokenizer is not None:
        notes(resolved.notices)
    else:
        note("no --tokenizer given: using the bundled model's")
    return load_tokenizer(resolved.folder), str(resolved.folder)


def _row(name: str, size: int, text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = len(tokenizer.encode(text))
    if not tokens:
        raise UsageError("this tokenizer gives no tokens for the text", where=name, hint="give another text")
    return _with_ratio(name, size, len(text), tokens)


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = [sum(row[key] for row in rows) for key in ("bytes", "characters", "tokens")]
    return _with_ratio("total", *sums)


def _with_ratio(name: str, size: int, characters: int, tokens: int) -> dict[str, Any]:
    return {
        "file": name,
        "bytes": size,
        "characters": characters,
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 4),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    for title in ("bytes", "characters", "tokens", "bytes/token"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        counts = [f"{row[key]:,}" for key in ("bytes", "characters", "tokens")]
        table.add_row(row["file"], *counts, f"{row['bytes_per_token']:.2f}")
    table_console(120).print(table)
