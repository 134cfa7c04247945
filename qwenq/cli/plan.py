"""``qwenq plan``: memory, disk and speed of a model, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import listed_names, listed_numbers
from qwenq.cli.printing import print_json
from qwenq.errors import UsageError


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Catalogue name, model folder or hub id. [default: the bundled model]"),
    ] = None,
    weights: Annotated[
        Literal["stored", "random"],
        typer.Option(help="random: MODEL is a catalogue name; only its shape matters here."),
    ] = "stored",
    bits: Annotated[str, typer.Option(help="Bits of the quantised model, comma-separated: 4, 8.")] = "4,8",
    context: Annotated[int, typer.Option(help="Context length in tokens.")] = 8192,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    gpu: Annotated[
        str,
        typer.Option(
            help="GPUs, comma-separated: h200, a100-80g, rtx-4090, … (a wrong name lists all). "
            "[default: a CPU]",
        ),
    ] = "",
    tp: Annotated[
        str, typer.Option(help="Numbers of GPUs for tensor parallelism, comma-separated: 1,2,4,8.")
    ] = "1",
    group_size: Annotated[
        str,
        typer.Option(help="Group size: auto, 128, 64, 32, or -1 (the whole row)."),
    ] = "auto",
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences. [default: 48; on a GPU 128]")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a calibration sequence. [default: 256; on a GPU 2048]")
    ] = None,
    pad_ffn: Annotated[bool, typer.Option("--pad-ffn", help="Show the effect of padding the MLP.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes.")] = False,
) -> None:
    """Show what a model needs, before anything is downloaded.

    Bytes on disk, memory, tensor parallelism, the bound on its speed.
    """
    from qwenq.plan.gpus import gpu as find_gpu
    from qwenq.plan.model import find_model
    from qwenq.plan.plan import Wishes, make_plan

    wishes = Wishes(
        bits=tuple(listed_numbers(bits, "--bits", "4,8")),
        context=context,
        batch=batch,
        gpus=tuple(map(find_gpu, listed_names(gpu, "--gpu"))) if gpu else (),
        tensor_parallel=tuple(listed_numbers(tp, "--tp")),
        group_size=None if group_size == "auto" else _group_size(group_size),
        samples=samples,
        seq_len=seq_len,
    )
    result = make_plan(find_model(model, weights), wishes)
    if as_json:
        print_json(result.as_dict())
        return
    from rich.console import Console

    from qwenq.plan.tables import plan_tables

    console = Console(highlight=False, emoji=False)  # tables of a plan have markup
    if not console.is_terminal:  # a pipe has no width
        console.width = 120
    for part in plan_tables(result, show_padding=pad_ffn):
        console.print(part)


def _group_size(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        hint = "use auto, 128, 64, 32 or -1"
        raise UsageError(f"{text!r} is not a group size", where="--group-size", hint=hint) from error
