"""``qwenq profile``: speed and memory of models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli import options
from qwenq.cli.app import app
from qwenq.cli.next import next_commands
from qwenq.cli.printing import print_tables, stop_notice, typed_command
from qwenq.cli.progress import ProfileProgress, with_details
from qwenq.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@app.command()
@options.recipe_options("profile.*", "weights")
def profile(
    typed: typer.Context,
    models: options.ModelArguments = None,
    *,
    given: options.Given,
    context: Annotated[
        str, typer.Option(help="Prompt tokens before generated ones, comma-separated; Qwen's cards have 1.")
    ] = "1",
    precision: Annotated[
        str,
        typer.Option(
            help="Precisions of models that are not quantised: fp32, bf16, fp16, int8, int4; with "
            "--endpoint, the one that the server computes in."
        ),
    ] = "fp32,bf16,int8,int4",
    kernel: options.KernelName = "auto",
    device: options.DeviceName = "auto",
    seed: options.RandomSeed = 0,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure a model behind an OpenAI-compatible server, such as http://HOST:8000/v1 (key in "
            "OPENAI_API_KEY), with streamed requests.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --endpoint: the model's name there.")] = None,
    concurrency: Annotated[
        str, typer.Option(help="With --endpoint: requests at once, comma-separated.")
    ] = "1,4,16,64",
    input: Annotated[int, typer.Option(help="With --endpoint: tokens of each prompt.")] = 512,
    output: Annotated[int, typer.Option(help="With --endpoint: tokens of each answer.")] = 128,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. [default: runs/profile-MODEL; with --endpoint runs/served-MODEL]"),
    ] = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON lines.")] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Processes that share a model, one a GPU.")] = 1,
) -> None:
    """Measure speed and memory, each point in a separate process.

    Points: models in each precision × attention × engine × length. A point that cannot run is reported with
    the reason, and the sweep goes on. Ctrl-C keeps what is measured; the same command goes on. With
    --endpoint: latency and throughput of a served model, at each concurrency.
    """
    from qwenq import api
    from qwenq.reporting import card
    from qwenq.reporting.served import served_table

    _refuse_stray(endpoint, options.typed_options(typed))
    progress = ProfileProgress(as_json=as_json, quiet=quiet)
    with stop_notice("what is measured is kept"), with_details(progress, verbose) as listener:
        found = api.profile(
            models,
            **given[""],
            **given["profile"],
            precision=options.listed_names(precision, "--precision"),
            concurrency=options.listed_numbers(concurrency, "--concurrency", "1,4,16"),
            input=input,
            output=output,
            context=options.listed_numbers(context, "--context", "1,1024"),
            kernel=kernel,
            device=device,
            seed=seed,
            tp=tp,
            endpoint=endpoint,
            model=model,
            out=out,
            progress=listener,
            command=typed_command(),
        )
    if not as_json:
        makers = (card.speed_table, card.memory_table, card.split_table, served_table)
        print_tables(found.folder, found.rows, makers)
        next_commands(("report", found.folder))


_OF_ENDPOINT = {"endpoint", "model", "concurrency", "input", "output"}
_OF_BOTH = {"models", "precision", "budget", "out", "quiet", "verbose", "as_json"}
"""Options of a served model; those that a model measured here has as well."""


def _refuse_stray(endpoint: str | None, typed: Sequence[str]) -> None:
    """Raise UsageError for an option that the other way to measure does not have."""
    if endpoint is None:
        if stray := [name for name in typed if name in _OF_ENDPOINT]:
            raise UsageError(
                f"--{stray[0]} is of a served model",
                where=f"--{stray[0]}",
                hint="name its server with --endpoint, or leave this option out",
            )
    elif stray := [name for name in typed if name not in _OF_ENDPOINT | _OF_BOTH]:
        raise options.server_decides(stray[0])
