"""Evaluate models item by item (``qwenq eval``), and print scores beside the base's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwenq.cli.app import app
from qwenq.cli.next import Words, named_base, next_commands
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
    Verbose,
    given_models,
    recipe_options,
)
from qwenq.cli.printing import (
    note,
    notes,
    print_rows,
    stop_notice,
    table_console,
    typed_command,
    wrapped,
)
from qwenq.errors import UsageError
from qwenq.events import Event, Notice
from qwenq.reporting.card import cut_of

if TYPE_CHECKING:
    from rich.table import Table

    from qwenq.evals.model import EvalModel, LoadOptions
    from qwenq.evals.suite import EvalRequest
    from qwenq.evals.task import DataSource
    from qwenq.recipe import EvalRecipe
    from qwenq.results import Row

# ``qwenq eval``: benchmarks, item by item, and whether the difference between two models is significant.


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
            "OPENAI_API_KEY); letters of questions need its log probabilities.",
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
    verbose: Verbose = False,
    as_json: RowsAsJson = False,
) -> None:
    """Evaluate models on MMLU, C-Eval, GSM8K, HumanEval and more.

    Answers are recorded in the run folder: the same command goes on where it was stopped, and no item is
    evaluated twice. Quantised models are compared with their base on the same items. Under torchrun its
    processes share the items.
    """
    from qwenq.distributed import process_group
    from qwenq.evals.model import LoadOptions
    from qwenq.evals.suite import evaluate as run_all
    from qwenq.evals.suite import evaluate_share
    from qwenq.models.folders import local_path
    from qwenq.models.identity import model_name
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
        from qwenq.evals.answer_log import show_item

        typer.echo(show_item(run, show, source))
        return
    size = _batch(batch)
    how = LoadOptions(device, chosen.dtype, engine, attention, kernel, chosen.thinking)
    wanted = _wanted(chosen, source, size, unsafe_code=unsafe_code)
    with process_group(device) as team:
        if endpoint is not None:
            eval_models = [_served(endpoint, model, how, size)]
        else:
            eval_models = _opened(names, how, quiet=not team.is_rank0)
        if not team.is_rank0:
            evaluate_share(eval_models, wanted, run, team)
            return
        from qwenq.cli.progress import EvalProgress, with_details

        with (
            stop_notice("answers are kept", team.world),
            EvalProgress(quiet=quiet) as progress,
            with_details(progress, verbose) as listener,
        ):
            rows = run_all(eval_models, wanted, run, listener, typed_command(team.world), team)
    if as_json:
        print_rows(run, rows)
    else:
        print_table(run, rows)
        beside = () if out is not None else ("--out", run)
        next_commands(*([*one, *beside] for one in _with_bases(eval_models, rows)), ("report", run))


def _wanted(chosen: EvalRecipe, source: DataSource, batch: int | None, *, unsafe_code: bool) -> EvalRequest:
    """Return the request for the evaluation.

    Raises:
        UsageError: a number by task names one that is not evaluated.
    """
    from qwenq.evals.suite import EvalRequest

    for option, numbers in (("--limit", chosen.limit), ("--max-new-tokens", chosen.max_new_tokens)):
        for task in numbers if isinstance(numbers, dict) else ():
            if task not in chosen.tasks:
                hint = f"--tasks are {', '.join(chosen.tasks)}"
                raise UsageError(f"{task!r} is not among the tasks", where=option, hint=hint)
    return EvalRequest(
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


def _opened(names: list[str | None], how: LoadOptions, *, quiet: bool) -> list[EvalModel]:
    """Return the models, opened."""
    from qwenq.evals.model import open_eval_model

    eval_models = [open_eval_model(name, how) for name in names]
    if not quiet:
        notes(notice for eval_model in eval_models for notice in eval_model.notices)
    return [*eval_models]


def _served(endpoint: str, model: str | None, how: LoadOptions, size: int | None) -> EvalModel:
    """Return the model behind an endpoint."""
    from qwenq.evals.endpoint import CONCURRENCY, endpoint_at
    from qwenq.evals.model import RemoteModel

    key = os.environ.get("OPENAI_API_KEY")
    found = endpoint_at(endpoint, model, key, size or CONCURRENCY, _show_notice)
    if how.thinking == "auto":
        note("whether this model thinks, its server decides; --thinking on or off asks for one of them")
        return RemoteModel(replace(found, thinking=None))
    return RemoteModel(replace(found, thinking=how.thinking == "on"))


def _show_notice(event: Event) -> None:
    if isinstance(event, Notice):
        note(event.text)


def _source(chosen: EvalRecipe) -> DataSource:
    """Return where the benchmarks' files come from."""
    from qwenq.evals.task import DataSource
    from qwenq.models.folders import local_path

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


def _with_bases(eval_models: Sequence[EvalModel], rows: Sequence[Row]) -> Iterator[Words]:
    """Yield this command with the base of each quantised model that was not compared with one, and say so."""
    from qwenq.evals.model import LocalModel

    compared = {row.model for row in rows if row.details.keys() & {"paired", "unpaired"}}
    here = {one.model.fingerprint for one in eval_models}
    for one in eval_models:
        if not isinstance(one, LocalModel) or not one.quantised or one.model in compared or one.base in here:
            continue
        note(f"{one.model.label} is not compared with its base, which was not evaluated")
        if (base := named_base(one.checkpoint.folder)) is not None:
            words = sys.argv[sys.argv.index("eval") + 1 :] if "eval" in sys.argv else []
            yield ("eval", base, *words)


# Print the result of an evaluation: a table of scores, and each model compared with its base.


_WIDE = 130
"""Columns of a terminal that has room for a score and its comparison in one line."""


def print_table(run: Path, rows: Sequence[Row]) -> None:
    """Print scores with their intervals, each model compared with its base, and the check's figures."""
    console = table_console(250)
    checks = [row for row in rows if "task" not in row.point]
    rows = [row for row in rows if "task" in row.point]
    order = {name: place for place, name in enumerate(dict.fromkeys(row.point["task"] for row in rows))}
    rows = sorted(rows, key=lambda row: order[row.point["task"]])
    compared = [row for row in rows if row.details.keys() & {"paired", "unpaired"}]
    aside = bool(compared) and console.width < _WIDE
    if rows:  # a split without answers has no score
        console.print(_table(rows, beside=bool(compared) and not aside))
    lines = [_in_a_line(row) for row in compared] if aside else []
    for line in [*lines, *_check_lines(checks), *_remarks(rows), *_headlines(rows)]:
        console.print(wrapped(line), soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)


def _table(rows: Sequence[Row], *, beside: bool) -> Table:
    """Return one line per score; ``beside``: with the comparison in further columns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("task", "protocol", "model"):
        table.add_column(title, overflow="fold", no_wrap=title == "protocol")
    figures = ("score", "± SE", "95 % interval", "items", "scored by", "cut")
    for title in (*figures, *(("change", "lost / won", "p") if beside else ())):
        table.add_column(title, justify="right", no_wrap=True)
    if beside:
        table.add_column("beside its base", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row), *(_comparison(row) if beside else ()))
    return table


def _in_a_line(row: Row) -> str:
    """Return as a line what the wide table has in its last columns."""
    change, counts, p, beside = _comparison(row)
    figures = f"change {change} points, lost / won {counts}, p {p}; " if change else ""
    task, _, model, *_ = _cells(row)
    return f"{task}, {model}: {figures}{beside}"


def _cells(row: Row) -> tuple[str, ...]:
    metric = row.metric.removeprefix("accuracy").lstrip(".")
    task = f"{row.point['task']}{f' ({metric})' if metric else ''}"
    interval = f"{row.low:.1%} – {row.high:.1%}" if row.low is not None and row.high is not None else "-"
    model = row.model.label
    value = f"{row.value:.1%}" if row.value is not None else "-"
    found = row.details.get("standard_error")
    error = f"± {100 * found:.1f}" if isinstance(found, float) else "-"
    asked = str(row.settings.get("asked", "-"))
    cut = "-" if (found := cut_of(row)) is None else f"{found.share:.1%}"
    return task, str(row.point["protocol"]), model, value, error, interval, f"{row.n:,}", asked, cut


def _comparison(row: Row) -> tuple[str, ...]:
    from qwenq.statistics import format_p

    found = row.details.get("paired")
    if found is None:
        return "", "", "", row.details.get("unpaired", "")
    counts = f"{found['lost']} / {found['won']}"
    beside = f"{found['base']}: {found['sentence']}"
    return f"{100 * found['change']:+.1f}", counts, format_p(found["p"]), beside


_CHECKS: dict[str, tuple[str, str, str]] = {
    "kl": ("KL divergence", ".4f", " nats a token"),
    "same_top": ("same top token", ".1%", ""),
    "perplexity.ratio": ("perplexity ×", ".3f", ""),
}


def _check_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line per model: ``Tiny-GPTQ-Int4 int4 beside its base, by the check: KL divergence …``."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        name, form, unit = _CHECKS.get(row.metric, (row.metric, "g", ""))
        said = f"{name} {row.value:{form}}{unit}" if row.value is not None else f"{name}: {row.reason}"
        if row.low is not None and row.high is not None:
            said += f" ({row.low:{form}} – {row.high:{form}})"
        lines.setdefault(row.model.label, []).append(said)
    return [f"{model} beside its base, by the check: {'; '.join(said)}" for model, said in lines.items()]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Return warnings about cut answers, the sample suite and limited items."""
    lines = [
        f"warning: {row.point['task']}, {row.model.label}: {found.warning}"
        for row in rows
        if (found := cut_of(row)) is not None and found.many
    ]
    lines += _guesses(rows)
    if any(row.point.get("data") == "sample suite" for row in rows):
        lines.append("the sample suite is not the benchmark: its scores compare with nothing published")
    limits = {row.point["task"]: row.point["limit"] for row in rows if row.point.get("limit") is not None}
    if limits:
        all_ = limits.keys() == {row.point["task"] for row in rows}
        which, limit = "" if all_ else f"{', '.join(map(str, limits))}: ", next(iter(limits.values()))
        lines.append(f"{which}limited to the first {limit} items of each subject or task")
    return lines


def _guesses(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each task that some models are at the level of guessing in."""
    from qwenq.comparison import guessing_level

    guessed: dict[tuple[str, float], list[str]] = {}
    for row in rows:
        if (level := guessing_level(row)) is not None:
            guessed.setdefault((str(row.point["task"]), level), []).append(row.model.label)
    for (task, level), models in guessed.items():
        what = f"at guessing level ({level:.0%})" if level else "no item answered correctly"
        yield f"{task}, {', '.join(models)}: {what}, so what quantising cost cannot show in this score"


def _headlines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each model that was compared: its largest drop, and the verdict."""
    from qwenq.comparison import Paired, TaskComparison, headline
    from qwenq.statistics import holm

    compared = [row for row in rows if "paired" in row.details]
    pairings = [Paired(*(row.details["paired"][key] for key in ("n", "lost", "won"))) for row in compared]
    by_model: dict[str, list[TaskComparison]] = {}
    for row, pairing, p in zip(compared, pairings, holm([one.p for one in pairings]), strict=True):
        value, change = row.value or 0.0, row.details["paired"]["change"]
        name = f"{row.model.label} beside its base"
        tested = TaskComparison(str(row.point["task"]), value - change, value, pairing, p)
        by_model.setdefault(name, []).append(tested)
    return [f"{name}: {headline(found, len(compared))}" for name, found in by_model.items()]
