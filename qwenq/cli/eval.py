"""``qwenq eval``: benchmarks, item by item, with what the difference between two models can mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import (
    AttentionName,
    DeviceName,
    DtypeName,
    EngineName,
    KernelName,
    RealWeights,
    RowsAsJson,
    RunFolder,
    ThinkingWish,
)
from qwenq.cli.printing import typed_command
from qwenq.errors import UsageError
from qwenq.events import Event, Notice

if TYPE_CHECKING:
    from qwenq.distributed import Team
    from qwenq.evals.contender import How
    from qwenq.evals.served import Contestant
    from qwenq.evals.suite import Wanted
    from qwenq.evals.task import DataSource
    from qwenq.results import Row

_RUNS = Path("runs")
_HOW = ("dtype", "device", "engine", "attention", "kernel")
"""Options that decide how a model is run here."""


@app.command("eval")
def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Folders or hub ids; quantised ones are compared with their base. Nothing: the bundled one.",
        ),
    ] = None,
    weights: RealWeights = "stored",
    tasks: Annotated[
        str,
        typer.Option(
            help="Of mmlu, ceval, gsm8k, humaneval, cmmlu, mbpp, math, bbh, ceval-test; with commas between. "
            "math and bbh have the base protocol only; ceval-test writes the file for C-Eval's leaderboard."
        ),
    ] = "mmlu,ceval,gsm8k,humaneval",
    protocol: Annotated[
        Literal["card", "base", "lm-eval"] | None,
        typer.Option(help="Whose prompts and averages. [default: card for chat models, else base]"),
    ] = None,
    subjects: Annotated[str | None, typer.Option(help="Only these, with commas between.")] = None,
    limit: Annotated[
        str | None,
        typer.Option(help="The first so many items of each subject or task: 20, or mmlu=20,gsm8k=150."),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples. [default: the protocol's]")] = None,
    thinking: ThinkingWish = "auto",
    max_new_tokens: Annotated[
        str | None,
        typer.Option(
            help="Most tokens of a written answer: 2048, or gsm8k=2048,humaneval=4096. "
            "[default: the protocol's; 32768 where the model thinks]"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with mmlu/, ceval/, gsm8k/, humaneval/ … [default: the hub]"),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="The small suite that ships with qwenq; not the benchmarks.")
    ] = False,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    engine: EngineName = "fast",
    attention: AttentionName = "auto",
    kernel: KernelName = "auto",
    batch: Annotated[str, typer.Option(help="auto, or how many prompts at once.")] = "auto",
    out: RunFolder = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask an OpenAI-compatible server, such as http://HOST:8000/v1, with the key in "
            "OPENAI_API_KEY, in tasks that write. --batch: requests at a time. [default: 8]",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --endpoint: the model's name there.")] = None,
    unsafe_code: Annotated[
        bool, typer.Option("--unsafe-code", help="Run what the model wrote without a sandbox, as you.")
    ] = False,
    show: Annotated[
        str | None, typer.Option(metavar="ID", help="Print one recorded item in full; run nothing.")
    ] = None,
    as_json: RowsAsJson = False,
) -> None:
    """Evaluate models on MMLU, C-Eval, GSM8K, HumanEval and more.

    Answers are recorded in the run folder: the same command goes on where it was stopped, and asks nothing
    twice. Quantised models are compared with their base on the same items. Under torchrun its processes share
    the items.
    """
    from qwenq.models.identity import model_name
    from qwenq.models.local_path import local_path
    from qwenq.models.opening import refuse_random_weights

    refuse_random_weights(weights)
    data = local_path(data, "--data") if data is not None else None
    given: list[str | None] = list(dict.fromkeys(models)) if models else [None]
    _check_endpoint(endpoint, model, models, _typed(context))
    named = (model or "served").rsplit("/", 1)[-1] if endpoint is not None else model_name(given[0])
    run = local_path(out if out is not None else _RUNS / named, "--out")
    source = _source(data, sample)
    if show is not None:
        from qwenq.evals.show import show_item

        typer.echo(show_item(run, show, source))
        return
    names, size = _listed(tasks, "--tasks"), _batch(batch)
    from qwenq.cli.eval_output import print_json, print_table
    from qwenq.distributed import assembled
    from qwenq.evals.contender import How
    from qwenq.evals.suite import Wanted, assist_all

    how = How(device, dtype, engine, attention, kernel, thinking)
    wanted = Wanted(
        tasks=names,
        protocol=protocol,
        subjects=_listed(subjects, "--subjects") if subjects is not None else (),
        shots=shots,
        limit=_by_task(limit, names, "--limit", "items"),
        max_new_tokens=_by_task(max_new_tokens, names, "--max-new-tokens", "tokens"),
        source=source,
        batch=size,
        unsafe_code=unsafe_code,
    )
    with assembled(device) as team:
        contenders = _contestants(given, how, endpoint, model, size, quiet=not team.leads)
        if not team.leads:
            assist_all(contenders, wanted, run, team)
            return
        rows = _run(contenders, wanted, run, team)
    if as_json:
        print_json(run, rows)
    else:
        print_table(run, rows)


def _typed(context: typer.Context) -> list[str]:
    """Of _HOW, the options that were given, be it with their default."""
    sources = ((name, context.get_parameter_source(name)) for name in _HOW)
    # By its name: typer brings a click of its own, or takes that which is installed.
    return [name for name, source in sources if source is not None and source.name != "DEFAULT"]


def _check_endpoint(
    endpoint: str | None, model: str | None, models: list[str] | None, typed: Sequence[str]
) -> None:
    """Refuse what has no meaning together.

    Args:
        endpoint, model, models: as typed.
        typed: of _HOW, those that were typed, be it with their default.

    Raises:
        UsageError: as it says.
    """
    if endpoint is None and model is not None:
        raise UsageError("--model names what an endpoint serves", hint="name models here without --model")
    if endpoint is not None and models:
        raise UsageError(
            "an endpoint is asked by itself",
            where="--endpoint",
            hint="leave out the models, or evaluate them into the same --out with a command of their own",
        )
    if endpoint is not None and typed:
        raise UsageError(
            "how a server runs its model is not decided here",
            where=f"--{typed[0]}",
            hint="tell the server; leave it out",
        )


def _contestants(
    given: list[str | None],
    how: How,
    endpoint: str | None,
    model: str | None,
    size: int | None,
    *,
    quiet: bool,
) -> Sequence[Contestant]:
    """The models, opened; or the one that is served."""
    if endpoint is not None:
        from qwenq.evals.endpoint import CONCURRENCY, endpoint_at
        from qwenq.evals.served import Served

        key = os.environ.get("OPENAI_API_KEY")
        found = endpoint_at(endpoint, model, key, size or CONCURRENCY, _show_notice)
        asked = None if how.thinking == "auto" else how.thinking == "on"
        if asked is None:
            _note("whether this model thinks, its server decides; --thinking on or off asks for one of them")
        return [Served(replace(found, thinking=asked))]
    from qwenq.evals.contender import open_contender

    contenders = [open_contender(one, how) for one in given]
    for notice in dict.fromkeys(notice for contender in contenders for notice in contender.notices):
        if not quiet:
            _note(notice)
    return contenders


def _run(contenders: Sequence[Contestant], wanted: Wanted, run: Path, team: Team) -> list[Row]:
    """Ask, and show how far it is."""
    from qwenq.cli.eval_output import Progress
    from qwenq.evals.suite import evaluate as run_all

    command = typed_command(team.world)
    try:
        with Progress() as progress:
            return run_all(contenders, wanted, run, progress, command, team)
    except KeyboardInterrupt:  # SIGTERM too
        typer.echo(
            f"\nstopped; answers are kept: the same command goes on where it stopped: {command}", err=True
        )
        raise


def _show_notice(event: Event) -> None:
    if isinstance(event, Notice):
        _note(event.text)


def _note(line: str) -> None:
    typer.echo(f"note: {line}", err=True)


def _source(data: Path | None, sample: bool) -> DataSource:
    from qwenq.evals.task import DataSource

    if data is not None and sample:
        raise UsageError("--data and --sample exclude each other", hint="give one of them")
    if data is not None and not data.is_dir():
        raise UsageError(
            "no such folder", where=data, hint="--data names a folder that holds mmlu/, ceval/, …"
        )
    return DataSource(data, sample)


def _listed(text: str, where: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("no name given", where=where)
    return names


def _by_task(text: str | None, tasks: Sequence[str], where: str, unit: str) -> int | dict[str, int] | None:
    """Read ``20`` for every task, or ``mmlu=20,gsm8k=150`` for these and the default for the others."""
    if text is None:
        return None
    if (number := _whole_number(text)) is not None:
        return number
    limits: dict[str, int] = {}
    for entry in text.split(","):
        task, _, count = (part.strip() for part in entry.partition("="))
        if (number := _whole_number(count)) is None:
            hint = "use a number from 1 on, or one for each task: mmlu=20,gsm8k=150"
            raise UsageError(f"{text!r} {unit}", where=where, hint=hint)
        if task not in tasks:
            hint = f"--tasks are {', '.join(tasks)}"
            raise UsageError(f"{task!r} is not asked for", where=where, hint=hint)
        if task in limits:
            raise UsageError(f"{task} is named twice", where=where, hint="give each task one number")
        limits[task] = number
    return limits


def _whole_number(text: str) -> int | None:
    """From 1 on; None: it is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0 else None


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if (number := _whole_number(text)) is None:
        raise UsageError(f"{text!r} prompts at once", where="--batch", hint="use auto, or a number from 1 on")
    return number
