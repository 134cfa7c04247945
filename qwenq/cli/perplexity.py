"""``qwenq perplexity``: perplexity of a text by context length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qwenq.cli import options
from qwenq.cli.app import app
from qwenq.cli.next import next_commands
from qwenq.cli.printing import print_rows, print_tables, stop_notice, typed_command
from qwenq.cli.progress import with_details
from qwenq.progress import StepListener


@app.command()
def perplexity(
    text: Annotated[
        Path, typer.Option(help="Long text to measure on: a file of text, JSON, CSV or parquet.")
    ],
    models: options.ModelArguments = None,
    weights: options.RealWeights = "stored",
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
    dtype: options.DtypeName = "auto",
    device: options.DeviceName = "auto",
    engine: options.EngineName = "fast",
    attention: options.AttentionName = "auto",
    kernel: options.KernelName = "auto",
    out: options.RunFolder = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    as_json: options.RowsAsJson = False,
) -> None:
    """Measure perplexity by context length.

    Qwen v1 models are measured with dynamic NTK and logn attention on and off; other models have neither.
    """
    from qwenq import api
    from qwenq.reporting.card import long_context_table

    with (
        stop_notice("lengths that were measured are kept"),
        StepListener(quiet=quiet) as plain,
        with_details(plain, verbose) as listener,
    ):
        found = api.perplexity(
            models,
            text,
            lengths=options.listed_numbers(lengths, "--lengths", "1024,2048,4096"),
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
        print_tables(found.folder, found.rows, [long_context_table])
        next_commands(("report", found.folder))


def _flag(word: str | None) -> bool | None:
    return None if word is None else word == "on"
