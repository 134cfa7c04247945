"""Evaluate models item by item (``qwenq eval``), and print scores beside the base's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenq.cli import options
from qwenq.cli.app import app
from qwenq.cli.next import Words, named_base, next_commands
from qwenq.cli.printing import columns, print_rows, stop_notice, table_console, typed_command
from qwenq.errors import UsageError
from qwenq.progress import StepListener, note, wrapped
from qwenq.reporting.card import cut_of

if TYPE_CHECKING:
    from qwenq.comparison import Paired
    from qwenq.results import Row

_LOCAL = ("dtype", "device", "engine", "attention", "kernel")
"""Options that decide how a model runs on this machine."""


@app.command("eval")
@options.recipe_options("eval.*")
def evaluate(
    context: typer.Context,
    models: options.ModelArguments = None,
    weights: options.RealWeights = "stored",
    *,
    given: options.Given,
    device: options.DeviceName = "auto",
    engine: options.EngineName = "fast",
    attention: options.AttentionName = "auto",
    kernel: options.KernelName = "auto",
    batch: Annotated[
        str, typer.Option(metavar="[auto|NUMBER]", help="Prompts at once; with --endpoint requests at once.")
    ] = "auto",
    out: options.RunFolder = None,
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
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    as_json: options.RowsAsJson = False,
) -> None:
    """Evaluate models on MMLU, C-Eval, GSM8K, HumanEval and more.

    Answers are recorded in the run folder: the same command goes on where it was stopped, and no item is
    evaluated twice. Quantised models are compared with their base on the same items. Under torchrun its
    processes share the items.
    """
    from qwenq import api
    from qwenq.api.measurements import each_once
    from qwenq.cli.progress import with_details
    from qwenq.distributed import process_group

    chosen, prompts = given["eval"], _batch(batch)
    local = [name for name in options.typed_options(context) if name in _LOCAL]
    if endpoint is not None and local:
        raise options.server_decides(local[0])
    if show is not None:
        _show(show, out, models, endpoint and (model or "served"), chosen)
        return
    with process_group(device) as team:
        kept = stop_notice("answers are kept", team.world) if team.is_rank0 else nullcontext()
        with (
            kept,
            StepListener(quiet=quiet or not team.is_rank0) as progress,
            with_details(progress, verbose and team.is_rank0) as listener,
        ):
            found = api.evaluate(
                models,
                **chosen,
                device=device,
                engine=engine,
                attention=attention,
                kernel=kernel,
                batch=prompts,
                unsafe_code=unsafe_code,
                endpoint=endpoint,
                model=model,
                out=out,
                progress=listener,
                team=team,
                command=typed_command(team.world),
            )
        if not team.is_rank0:
            return
    if as_json:
        print_rows(found.folder, found.rows)
    else:
        print_table(found.folder, found.rows)
        beside = () if out is not None else ("--out", found.folder)
        bases = [] if endpoint is not None else _with_bases(each_once(models), found.rows)
        next_commands(*([*one, *beside] for one in bases), ("report", found.folder))


def _show(
    id_: str, out: Path | None, models: list[str] | None, served: str | None, chosen: dict[str, Any]
) -> None:
    """Print one recorded item in full."""
    from qwenq.api.measurements import each_once
    from qwenq.evals.answer_log import show_item
    from qwenq.evals.suite import run_folder, source_of

    source = source_of(chosen.get("data"), chosen.get("sample", False))
    typer.echo(show_item(run_folder(out, each_once(models), served), id_, source))


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise UsageError(f"{text!r} prompts at once", where="--batch", hint="use auto, or a number from 1 on")
    return int(text)


def _with_bases(names: list[str | None], rows: Sequence[Row]) -> Iterator[Words]:
    """Yield this command with the base of each quantised model that was not compared with one, and say so."""
    from qwenq.comparison import PLAIN
    from qwenq.models.identity import model_name
    from qwenq.models.opening import resolve_model

    scores = [row for row in rows if "items" in row.details]
    here = {row.model.fingerprint for row in scores}
    compared = {row.model for row in scores if row.details.keys() & {"paired", "unpaired"}}
    apart = {row.model: row.details.get("base") for row in scores if row.model.precision not in PLAIN}
    for model in [one for one, base in apart.items() if one not in compared and base not in here]:
        note(f"{model.label} is not compared with its base, which was not evaluated")
        name = next(name for name in names if model_name(name) == model.name)
        if (base := named_base(resolve_model(name).folder)) is not None:
            words = sys.argv[sys.argv.index("eval") + 1 :] if "eval" in sys.argv else []
            yield ("eval", base, *words)


# Print the result of an evaluation: a table of scores, and each model compared with its base.


_TITLES = ("task", "protocol", "model", "score", "± SE", "95 % interval", "items", "scored by", "cut")
_SHARED = ("protocol", "scored by", "cut")
"""Columns that become a line below the table where all rows have the same there."""


def print_table(run: Path, rows: Sequence[Row]) -> None:
    """Print scores with their intervals, each model compared with its base, and the check's figures."""
    console = table_console(250)
    checks = [row for row in rows if "task" not in row.point]
    rows = [row for row in rows if "task" in row.point]
    order = {name: place for place, name in enumerate(dict.fromkeys(row.point["task"] for row in rows))}
    rows = sorted(rows, key=lambda row: order[row.point["task"]])
    if rows:  # a split without answers has no score
        found = dict(zip(_TITLES, zip(*map(_cells, rows), strict=True), strict=True))
        shared = {title: found.pop(title)[0] for title in _SHARED if len(set(found[title])) == 1}
        labels = 2 if "protocol" in shared else 3
        console.print(columns(list(found), zip(*found.values(), strict=True), labels))
        if said := "; ".join(f"{title}: {value}" for title, value in shared.items() if value != "-"):
            console.print(said)
    compared = [row for row in rows if row.details.keys() & {"paired", "unpaired"}]
    tests = _tests(compared)
    lines = [_comparison(row, tests) for row in compared]
    for line in [*lines, *_check_lines(checks), *_remarks(rows), *_headlines(rows, tests)]:
        console.print(wrapped(line), soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)


def _tests(compared: Sequence[Row]) -> dict[int, tuple[Paired, float]]:
    """Return each comparison and its p value, corrected by Holm for all of them, by ``id`` of its row."""
    from qwenq.comparison import Paired
    from qwenq.statistics import holm

    tested = [row for row in compared if "paired" in row.details]
    found = [Paired(*(row.details["paired"][key] for key in ("n", "lost", "won"))) for row in tested]
    p_values = holm([pairing.p for pairing in found])
    return {id(row): test for row, test in zip(tested, zip(found, p_values, strict=True), strict=True)}


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


def _comparison(row: Row, tests: dict[int, tuple[Paired, float]]) -> str:
    """Return what a score is beside the base's, as in ``mmlu, Tiny int8: change +0.3 points, …``."""
    from qwenq.statistics import format_p

    task, _, model, *_ = _cells(row)
    if id(row) not in tests:
        return f"{task}, {model}: {row.details.get('unpaired', '')}"
    found, (pairing, p) = row.details["paired"], tests[id(row)]
    figures = f"lost / won {pairing.lost} / {pairing.won}, p {format_p(pairing.p)}"
    beside = pairing.describe_change(found["change"], p, len(tests))
    return (
        f"{task}, {model}: change {100 * found['change']:+.1f} points, {figures}; {found['base']}: {beside}"
    )


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
        lines.append(
            "the sample suite is not the benchmark: its scores are not comparable with any published"
        )
    tasks: dict[object, list[str]] = {}
    for row in rows:
        tasks.setdefault(row.point.get("limit"), []).append(str(row.point["task"]))
    for limit, names in tasks.items():
        if limit is not None:
            which = "" if len(tasks) == 1 else f"{', '.join(dict.fromkeys(names))}: "
            lines.append(f"{which}limited to the first {limit} items of each subject or task")
    return lines


def _guesses(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each task that some models are at the level of guessing in."""
    from qwenq.comparison import guessing_level
    from qwenq.evals.tasks.registry import protocol_names

    guessed: dict[tuple[str, str, float], list[str]] = {}
    for row in rows:
        if (level := guessing_level(row)) is not None:
            asked = str(row.point["task"]), str(row.point["protocol"]), level
            guessed.setdefault(asked, []).append(row.model.label)
    for (task, protocol, level), models in guessed.items():
        what = f"at guessing level ({level:.0%})" if level else "no item answered correctly"
        other = protocol == "card" and "base" in protocol_names(task)
        remedy = "; a small model may do better with --protocol base" if other else ""
        yield f"{task}, {', '.join(models)}: {what}: this score cannot show what quantising cost{remedy}"


def _headlines(rows: Sequence[Row], tests: dict[int, tuple[Paired, float]]) -> list[str]:
    """Return a line for each model that was compared: its largest drop, and the verdict."""
    from qwenq.comparison import TaskComparison, headline

    by_model: dict[str, list[TaskComparison]] = {}
    unpaired = Counter(row.model.label for row in rows if "unpaired" in row.details)
    for row in rows:
        if id(row) in tests:
            value, change = row.value or 0.0, row.details["paired"]["change"]
            tested = TaskComparison(str(row.point["task"]), value - change, value, *tests[id(row)])
            by_model.setdefault(row.model.label, []).append(tested)
    return [
        f"{name} beside its base: {headline(found, len(tests), unpaired[name])}"
        for name, found in by_model.items()
    ]
