"""``qwenq perplexity``: perplexity of a text by context length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.next import next_commands
from qwenq.cli.options import (
    AttentionName,
    DeviceName,
    DtypeName,
    EngineName,
    KernelName,
    ModelArguments,
    Quiet,
    RealWeights,
    RowsAsJson,
    RunFolder,
    Verbose,
    listed_numbers,
)
from qwenq.cli.printing import columns, print_rows, stop_notice, table_console, typed_command
from qwenq.cli.progress import StepListener, with_details

if TYPE_CHECKING:
    from qwenq.results import Row


@app.command()
def perplexity(
    text: Annotated[
        Path, typer.Option(help="Long text to measure on: a file of text, JSON, CSV or parquet.")
    ],
    models: ModelArguments = None,
    weights: RealWeights = "stored",
    lengths: Annotated[
        str,
        typer.Option(help="Context lengths in tokens, comma-separated; each divides the longest."),
    ] = "1024,2048,4096,8192",
    samples: Annotated[
        int,
        typer.Option(min=1, help="Windows of the longest length; shorter windows are cut from these."),
    ] = 4,
    ntk: Annotated[
        Literal["on", "off"] | None, typer.Option(help="Qwen v1's dynamic NTK. [default: both]")
    ] = None,
    logn: Annotated[
        Literal["on", "off"] | None, typer.Option(help="Qwen v1's logn attention. [default: both]")
    ] = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    engine: EngineName = "fast",
    attention: AttentionName = "auto",
    kernel: KernelName = "auto",
    out: RunFolder = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: RowsAsJson = False,
) -> None:
    """Measure perplexity by context length.

    Qwen v1 models are measured with dynamic NTK and logn attention on and off; other models have neither.
    """
    from qwenq import api

    with (
        stop_notice("lengths that were measured are kept"),
        StepListener(quiet=quiet) as plain,
        with_details(plain, verbose) as listener,
    ):
        found = api.perplexity(
            models,
            text,
            lengths=listed_numbers(lengths, "--lengths", "1024,2048,4096"),
            samples=samples,
            ntk=_flag(ntk),
            logn=_flag(logn),
            dtype=dtype,
            device=device,
            engine=engine,
            attention=attention,
            kernel=kernel,
            out=out,
            progress=listener,
            command=typed_command(),
        )
    if as_json:
        print_rows(found.folder, found.rows)
    else:
        _print_table(found.folder, found.rows)
        next_commands(("report", found.folder))


def _flag(word: str | None) -> bool | None:
    return None if word is None else word == "on"


def _print_table(run: Path, rows: Sequence[Row]) -> None:
    """Print perplexities of models and switches by length, in the form of Qwen's cards."""
    lengths = sorted({length for row in rows if isinstance(length := row.point["seq_len"], int)})
    lines: dict[tuple[str, str, str], dict[object, str]] = {}
    for row in rows:
        named = row.model.label
        where = (named, str(row.point.get("ntk", "-")), str(row.point.get("logn", "-")))
        shown = f"{row.value:.3f}" if row.value is not None else "n/a"
        lines.setdefault(where, {})[row.point["seq_len"]] = shown
    titles = ("model", "NTK", "logn", *(f"{length:,}" for length in lengths))
    console = table_console(200)
    cells = [(*where, *(found.get(length, "") for length in lengths)) for where, found in lines.items()]
    console.print(columns(titles, cells, labels=3))
    for reason in dict.fromkeys(f"n/a: {row.reason}" for row in rows if row.value is None):
        console.print(reason, soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)
