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
    given_models,
    listed_numbers,
)
from qwenq.cli.printing import note, notes, print_rows, stop_notice, table_console, typed_command
from qwenq.cli.progress import show_events, with_details
from qwenq.errors import UsageError
from qwenq.events import Listener, counted

if TYPE_CHECKING:
    from qwenq.evals.model import LocalModel
    from qwenq.evals.perplexity import ScoredText, Switches
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
    from qwenq.evals.model import LoadOptions, open_eval_model
    from qwenq.evals.perplexity import combinations, require_lengths
    from qwenq.models.folders import local_path
    from qwenq.models.identity import model_name
    from qwenq.models.opening import refuse_random_weights

    refuse_random_weights(weights)
    text = local_path(text, "--text")
    wanted = sorted(listed_numbers(lengths, "--lengths", "1024,2048,4096"))
    names = given_models(models)
    run = local_path(out if out is not None else Path("runs") / model_name(names[0]), "--out")
    eval_models = [
        open_eval_model(one, LoadOptions(device, dtype, engine, attention, kernel)) for one in names
    ]
    switches = [
        combinations(one.checkpoint.config, _flag(ntk), _flag(logn), one.model.name) for one in eval_models
    ]
    texts = [_text(text, one, samples, max(wanted)) for one in eval_models]
    for made in texts:
        require_lengths(wanted, made)
    notes(notice for one in eval_models for notice in one.notices)
    rows = []
    with stop_notice("lengths that were measured are kept"):
        for eval_model, found, tokens in zip(eval_models, switches, texts, strict=True):
            with show_events(note, quiet=quiet) as plain, with_details(plain, verbose) as listener:
                rows += _measured(eval_model, tokens, wanted, found, run, listener)
            eval_model.unload()
    if as_json:
        print_rows(run, rows)
    else:
        _print_table(run, rows)
        next_commands(("report", run))


def _measured(
    eval_model: LocalModel,
    text: ScoredText,
    lengths: Sequence[int],
    switches: Sequence[Switches | None],
    run: Path,
    listener: Listener,
) -> list[Row]:
    """Return every row: those that the run folder has, and new ones, appended to it as they are made."""
    from dataclasses import replace

    from qwenq.environment import MACHINE, environment, machine
    from qwenq.evals.perplexity import perplexities
    from qwenq.results import append_row, read_rows, write_environment
    from qwenq.storage import locked

    rows = []
    with locked(run), counted(listener, eval_model.model.label, "tokens") as progress:
        known = read_rows(run) if (run / "results.jsonl").exists() else []
        found = environment()
        write_environment(run, found)
        for row in perplexities(
            eval_model, text, lengths, switches, command=typed_command(), progress=progress, known=known
        ):
            if any(row is one for one in known):
                rows.append(row)
                continue
            rows.append(replace(row, settings={**row.settings, MACHINE: machine(found)}))
            append_row(run, rows[-1])
    return rows


def _text(path: Path, eval_model: LocalModel, windows: int, longest: int) -> ScoredText:
    """Return the first ``windows * longest`` tokens of a file."""
    import torch

    from qwenq.calibration.files import read_file
    from qwenq.calibration.self_text import separator_of
    from qwenq.calibration.sequences import check_vocabulary, ids_of
    from qwenq.evals.perplexity import ScoredText

    tokenizer = eval_model.tokenizer
    end = separator_of(tokenizer) if path.suffix.lower() != ".txt" else None  # passages of one text have none
    ids: list[int] = []
    for document in read_file(path):
        ids += ids_of(document, tokenizer, special=False) + ([end] if end is not None else [])
        if len(ids) >= windows * longest:
            break
    if len(ids) < windows * longest:
        fit = len(ids) // longest
        raise UsageError(
            f"{windows} windows of {longest:,} tokens are needed, but the text has {len(ids):,} tokens",
            where=path,
            hint=f"lower --samples to {fit}" if fit else "give a longer text, or shorter --lengths",
        )
    tokens = torch.tensor(ids[: windows * longest], dtype=torch.int64).view(windows, longest)
    check_vocabulary(tokens, int(eval_model.checkpoint.config["vocab_size"]), str(path))
    return ScoredText(path.name, tokens)


def _flag(word: str | None) -> bool | None:
    return None if word is None else word == "on"


def _print_table(run: Path, rows: Sequence[Row]) -> None:
    """Print perplexities of models and switches by length, in the form of Qwen's cards."""
    from rich.table import Table

    lengths = sorted({length for row in rows if isinstance(length := row.point["seq_len"], int)})
    table = Table("model", "NTK", "logn", box=None, pad_edge=False)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    lines: dict[tuple[str, str, str], dict[object, str]] = {}
    for row in rows:
        named = row.model.label
        where = (named, str(row.point.get("ntk", "-")), str(row.point.get("logn", "-")))
        shown = f"{row.value:.3f}" if row.value is not None else "n/a"
        lines.setdefault(where, {})[row.point["seq_len"]] = shown
    for where, cells in lines.items():
        table.add_row(*where, *(cells.get(length, "") for length in lengths))
    console = table_console(200)
    console.print(table)
    for reason in dict.fromkeys(f"n/a: {row.reason}" for row in rows if row.value is None):
        console.print(reason, soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)
