"""``qwenq eval``: benchmarks, item by item, and whether the difference between two models is significant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.options import (
    AttentionName,
    DeviceName,
    EngineName,
    Given,
    KernelName,
    ModelArguments,
    Quiet,
    RealWeights,
    RowsAsJson,
    RunFolder,
    given_models,
    recipe_options,
)
from qwenq.cli.printing import next_commands, note, notes, print_rows, stop_notice, typed_command
from qwenq.errors import UsageError
from qwenq.events import Event, Notice

if TYPE_CHECKING:
    from qwenq.evals.contender import How
    from qwenq.evals.served import Contestant
    from qwenq.evals.suite import Wanted
    from qwenq.evals.task import DataSource
    from qwenq.recipe import EvalRecipe

_LOCAL = ("dtype", "device", "engine", "attention", "kernel")
"""Options that decide how a model runs on this machine."""


@app.command("eval")
@recipe_options("eval.*")
def evaluate(
    context: typer.Context,
    models: ModelArguments = None,
    weights: RealWeights = "stored",
    *,
    given: Given,
    device: DeviceName = "auto",
    engine: EngineName = "fast",
    attention: AttentionName = "auto",
    kernel: KernelName = "auto",
    batch: Annotated[
        str, typer.Option(metavar="[auto|NUMBER]", help="Prompts at once; with --endpoint requests at once.")
    ] = "auto",
    out: RunFolder = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Evaluate a model behind an OpenAI-compatible server, such as http://HOST:8000/v1 (key in "
            "OPENAI_API_KEY), on tasks with written answers.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --endpoint: the model's name there.")] = None,
    unsafe_code: Annotated[
        bool,
        typer.Option("--unsafe-code", help="Run generated programs without a sandbox, with your rights."),
    ] = False,
    show: Annotated[
        str | None, typer.Option(metavar="ID", help="Print one recorded item in full and exit.")
    ] = None,
    quiet: Quiet = False,
    as_json: RowsAsJson = False,
) -> None:
    """Evaluate models on MMLU, C-Eval, GSM8K, HumanEval and more.

    Answers are recorded in the run folder: the same command goes on where it was stopped, and no item is
    evaluated twice. Quantised models are compared with their base on the same items. Under torchrun its
    processes share the items.
    """
    from qwenq.distributed import assembled
    from qwenq.evals.contender import How
    from qwenq.evals.suite import assist_all
    from qwenq.evals.suite import evaluate as run_all
    from qwenq.models.identity import model_name
    from qwenq.models.local_path import local_path
    from qwenq.models.opening import refuse_random_weights
    from qwenq.recipe import EvalRecipe, Recipe

    refuse_random_weights(weights)
    chosen = Recipe().override(eval=given["eval"]).eval or EvalRecipe()
    names = given_models(models)
    _check_endpoint(endpoint, model, models, _typed(context))
    named = (model or "served").rsplit("/", 1)[-1] if endpoint is not None else model_name(names[0])
    run = local_path(out if out is not None else Path("runs") / named, "--out")
    source = _source(chosen)
    if show is not None:
        from qwenq.evals.show import show_item

        typer.echo(show_item(run, show, source))
        return
    size = _batch(batch)
    how = How(device, chosen.dtype, engine, attention, kernel, chosen.thinking)
    wanted = _wanted(chosen, source, size, unsafe_code=unsafe_code)
    with assembled(device) as team:
        if endpoint is not None:
            contenders = [_served(endpoint, model, how, size)]
        else:
            contenders = _opened(names, how, quiet=not team.leads)
        if not team.leads:
            assist_all(contenders, wanted, run, team)
            return
        from qwenq.cli.eval_output import print_table
        from qwenq.cli.progress import EvalProgress

        with stop_notice("answers are kept", team.world), EvalProgress(quiet=quiet) as progress:
            rows = run_all(contenders, wanted, run, progress, typed_command(team.world), team)
    if as_json:
        print_rows(run, rows)
    else:
        print_table(run, rows)
        next_commands(("report", run))


def _wanted(chosen: EvalRecipe, source: DataSource, batch: int | None, *, unsafe_code: bool) -> Wanted:
    """Return the request for the evaluation.

    Raises:
        UsageError: a number by task names one that is not evaluated.
    """
    from qwenq.evals.suite import Wanted

    for option, numbers in (("--limit", chosen.limit), ("--max-new-tokens", chosen.max_new_tokens)):
        for task in numbers if isinstance(numbers, dict) else ():
            if task not in chosen.tasks:
                hint = f"--tasks are {', '.join(chosen.tasks)}"
                raise UsageError(f"{task!r} is not among the tasks", where=option, hint=hint)
    return Wanted(
        tasks=chosen.tasks,
        protocol=None if chosen.protocol == "auto" else chosen.protocol,
        subjects=chosen.subjects,
        shots=chosen.shots,
        limit=chosen.limit,
        max_new_tokens=chosen.max_new_tokens,
        source=source,
        batch=batch,
        unsafe_code=unsafe_code,
    )


def _typed(context: typer.Context) -> list[str]:
    """Return those of _LOCAL that were typed, be it with their default."""
    sources = ((name, context.get_parameter_source(name)) for name in _LOCAL)
    # Compared by its name: typer uses either its bundled click or the installed one.
    return [name for name, source in sources if source is not None and source.name != "DEFAULT"]


def _check_endpoint(
    endpoint: str | None, model: str | None, models: list[str] | None, typed: Sequence[str]
) -> None:
    """Raise UsageError for options that exclude each other; ``typed``: those of _LOCAL that were typed."""
    if endpoint is None and model is not None:
        raise UsageError(
            "--model is the name of a model behind --endpoint", hint="name local models without --model"
        )
    if endpoint is not None and models:
        raise UsageError(
            "--endpoint evaluates the server's model alone",
            where="--endpoint",
            hint="leave out the models, or evaluate them into the same --out with another command",
        )
    if endpoint is not None and typed:
        raise UsageError(
            "the server decides how it runs its model",
            where=f"--{typed[0]}",
            hint="leave this option out, and set it on the server",
        )


def _opened(names: list[str | None], how: How, *, quiet: bool) -> list[Contestant]:
    """Return the models, opened."""
    from qwenq.evals.contender import open_contender

    contenders = [open_contender(name, how) for name in names]
    if not quiet:
        notes(notice for contender in contenders for notice in contender.notices)
    return [*contenders]


def _served(endpoint: str, model: str | None, how: How, size: int | None) -> Contestant:
    """Return the model behind an endpoint."""
    from qwenq.evals.endpoint import CONCURRENCY, endpoint_at
    from qwenq.evals.served import Served

    key = os.environ.get("OPENAI_API_KEY")
    found = endpoint_at(endpoint, model, key, size or CONCURRENCY, _show_notice)
    if how.thinking == "auto":
        note("whether this model thinks, its server decides; --thinking on or off asks for one of them")
        return Served(replace(found, thinking=None))
    return Served(replace(found, thinking=how.thinking == "on"))


def _show_notice(event: Event) -> None:
    if isinstance(event, Notice):
        note(event.text)


def _source(chosen: EvalRecipe) -> DataSource:
    """Return where the benchmarks' files come from."""
    from qwenq.evals.task import DataSource
    from qwenq.models.local_path import local_path

    if chosen.data is None:
        return DataSource(None, chosen.sample)
    if chosen.sample:
        raise UsageError("--data and --sample exclude each other", hint="give one of them")
    folder = local_path(chosen.data, "--data")
    if not folder.is_dir():
        raise UsageError(
            "no such folder", where=folder, hint="--data names a folder that holds mmlu/, ceval/, …"
        )
    return DataSource(folder, sample=False)


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise UsageError(f"{text!r} prompts at once", where="--batch", hint="use auto, or a number from 1 on")
    return int(text)
