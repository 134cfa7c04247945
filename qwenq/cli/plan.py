"""``qwenq plan``: what a model needs, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qwenq.cli.app import app
from qwenq.errors import UsageError


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Catalogue name, model folder or hub id. Nothing: the bundled model."),
    ] = None,
    weights: Annotated[
        Literal["stored", "random"],
        typer.Option(help="random: MODEL is a catalogue name; the shape alone counts here."),
    ] = "stored",
    bits: Annotated[str, typer.Option(help="Bits to plan for, comma-separated: 4, 8.")] = "4,8",
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="GPUs, comma-separated: h200, a100-80g, rtx-4090, …; none: a CPU.")
    ] = "",
    tp: Annotated[str, typer.Option(help="Numbers of GPUs that share the model: 1,2,4,8.")] = "1",
    group_size: Annotated[str, typer.Option(help="auto, 128, 64, 32, or -1 for whole rows.")] = "auto",
    samples: Annotated[int | None, typer.Option(help="Calibration sequences; 48, on a GPU 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of each; 256, on a GPU 2048.")] = None,
    pad_ffn: Annotated[bool, typer.Option("--pad-ffn", help="Show what padding the MLP changes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes.")] = False,
) -> None:
    """Plan what a model needs, before anything is downloaded.

    Bytes on disk, memory, tensor parallelism, the bound on its speed.
    """
    from qwenq.plan.gpus import gpu as find_gpu
    from qwenq.plan.model import find_model
    from qwenq.plan.plan import Wishes, make_plan

    wishes = Wishes(
        bits=_numbers(bits, "--bits"),
        context=context,
        batch=batch,
        gpus=tuple(find_gpu(name.strip()) for name in gpu.split(",") if name.strip()),
        tensor_parallel=_numbers(tp, "--tp"),
        group_size=None if group_size == "auto" else _group_size(group_size),
        samples=samples,
        seq_len=seq_len,
    )
    result = make_plan(find_model(model, weights), wishes)
    if as_json:
        import json

        typer.echo(json.dumps(result.as_dict(), indent=2))
        return
    from rich.console import Console

    from qwenq.plan.tables import plan_tables

    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = 120
    for part in plan_tables(result, show_padding=pad_ffn):
        console.print(part)


def _group_size(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        hint = "use auto, 128, 64, 32 or -1"
        raise UsageError(f"{text!r} is no group size", where="--group-size", hint=hint) from error


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Comma-separated whole numbers, each once, in the order given."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of whole numbers", where=option, hint="write 1,2,4") from error
    if not numbers:
        raise UsageError("no number is given", where=option, hint="write 1,2,4")
    return numbers
