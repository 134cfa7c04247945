"""``qwenq perplexity``: how well a model predicts a text, by how much of it it may look back on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import (
    AttentionName,
    DeviceName,
    DtypeName,
    KernelName,
    RealWeights,
    RowsAsJson,
    RunFolder,
)
from qwenq.cli.printing import typed_command
from qwenq.errors import UsageError

if TYPE_CHECKING:
    from qwenq.evals.contender import Contender
    from qwenq.evals.perplexity import Switches, Text
    from qwenq.results import Row

_RUNS = Path("runs")


@app.command()
def perplexity(
    text: Annotated[
        Path, typer.Option(help="Long text to measure on: a .txt, .jsonl, .json or .parquet file.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Folders or hub ids. Nothing: the bundled one."),
    ] = None,
    weights: RealWeights = "stored",
    lengths: Annotated[
        str, typer.Option(help="Tokens of context, with commas between; each divides the longest.")
    ] = "1024,2048,4096,8192",
    samples: Annotated[
        int, typer.Option(min=1, help="Windows of the longest length; shorter ones are cut from these.")
    ] = 4,
    ntk: Annotated[
        Literal["on", "off"] | None, typer.Option(help="Qwen v1's dynamic NTK. [default: both]")
    ] = None,
    logn: Annotated[
        Literal["on", "off"] | None, typer.Option(help="Qwen v1's logn attention. [default: both]")
    ] = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    attention: AttentionName = "auto",
    kernel: KernelName = "auto",
    out: RunFolder = None,
    as_json: RowsAsJson = False,
) -> None:
    """Measure perplexity by context length.

    Qwen v1 models are measured with dynamic NTK and logn attention on and off; others as they are.
    """
    from qwenq.evals.contender import How, open_contender
    from qwenq.evals.perplexity import combinations, require_lengths
    from qwenq.models.identity import model_name
    from qwenq.models.local_path import local_path
    from qwenq.models.opening import refuse_random_weights

    refuse_random_weights(weights)
    text = local_path(text, "--text")
    wanted = _lengths(lengths)
    given: list[str | None] = list(dict.fromkeys(models)) if models else [None]
    run = local_path(out if out is not None else _RUNS / model_name(given[0]), "--out")
    contenders = [open_contender(one, How(device, dtype, "fast", attention, kernel)) for one in given]
    switches = [
        combinations(one.checkpoint.config, _flag(ntk), _flag(logn), one.model.name) for one in contenders
    ]
    texts = [_text(text, one, samples, max(wanted)) for one in contenders]
    for made in texts:
        require_lengths(wanted, made)
    for notice in dict.fromkeys(notice for one in contenders for notice in one.notices):
        typer.echo(f"note: {notice}", err=True)
    rows = []
    for contender, found, tokens in zip(contenders, switches, texts, strict=True):
        rows += _measured(contender, tokens, wanted, found, run)
        contender.unload()
    if as_json:
        content = {"run": str(run), "rows": [row.to_json() for row in rows]}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_table(run, rows)


def _measured(
    contender: Contender,
    text: Text,
    lengths: Sequence[int],
    switches: Sequence[Switches | None],
    run: Path,
) -> list[Row]:
    """Every row: those that the run folder has, and the others, appended to it as they are made."""
    from dataclasses import replace

    from qwenq.cli.progress import show_progress
    from qwenq.environment import MACHINE, environment, machine
    from qwenq.evals.perplexity import perplexities
    from qwenq.results import append_row, read_rows, write_environment
    from qwenq.storage import locked

    command = typed_command()
    rows = []
    try:
        with locked(run), show_progress(contender.model.name) as progress:
            known = read_rows(run) if (run / "results.jsonl").exists() else []
            found = environment()
            write_environment(run, found)
            for row in perplexities(
                contender, text, lengths, switches, command=command, progress=progress, known=known
            ):
                if any(row is one for one in known):
                    rows.append(row)
                    continue
                rows.append(replace(row, settings={**row.settings, MACHINE: machine(found)}))
                append_row(run, rows[-1])
    except KeyboardInterrupt:  # SIGTERM too
        typer.echo(
            f"\nstopped; lengths that were measured are kept: the same command goes on: {command}", err=True
        )
        raise
    return rows


def _text(path: Path, contender: Contender, windows: int, longest: int) -> Text:
    """The first ``windows * longest`` tokens of a file, in its order."""
    import torch

    from qwenq.calibration.files import read_file
    from qwenq.calibration.self_text import separator_of
    from qwenq.calibration.sequences import check_vocabulary, ids_of
    from qwenq.evals.perplexity import Text

    tokenizer = contender.tokenizer
    end = separator_of(tokenizer) if path.suffix.lower() != ".txt" else None  # passages of one text have none
    ids: list[int] = []
    for document in read_file(path):
        ids += ids_of(document, tokenizer, special=False) + ([end] if end is not None else [])
        if len(ids) >= windows * longest:
            break
    if len(ids) < windows * longest:
        fit = len(ids) // longest
        raise UsageError(
            f"{windows} windows of {longest:,} tokens are wanted, and the text has {len(ids):,} tokens",
            where=path,
            hint=f"lower --samples to {fit}" if fit else "give a longer text, or shorter --lengths",
        )
    tokens = torch.tensor(ids[: windows * longest], dtype=torch.int64).view(windows, longest)
    check_vocabulary(tokens, int(contender.checkpoint.config["vocab_size"]), str(path))
    return Text(path.name, tokens)


def _lengths(text: str) -> list[int]:
    """The numbers of ``--lengths``, each once, in order."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"{text!r} are no lengths", where="--lengths", hint="such as 1024,2048,4096")
    return sorted({int(part) for part in parts})


def _flag(word: str | None) -> bool | None:
    return None if word is None else word == "on"


def _print_table(run: Path, rows: Sequence[Row]) -> None:
    """Models and switches by length, as Qwen's cards have it."""
    from rich.console import Console
    from rich.table import Table

    lengths = sorted({length for row in rows if isinstance(length := row.point["seq_len"], int)})
    table = Table("model", "NTK", "logn", box=None, pad_edge=False)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    lines: dict[tuple[str, str, str], dict[object, str]] = {}
    for row in rows:
        named = f"{row.model.name} {row.model.precision}"
        where = (named, str(row.point.get("ntk", "-")), str(row.point.get("logn", "-")))
        shown = f"{row.value:.3f}" if row.value is not None else "n/a"
        lines.setdefault(where, {})[row.point["seq_len"]] = shown
    for where, cells in lines.items():
        table.add_row(*where, *(cells.get(length, "") for length in lengths))
    console = Console(highlight=False, markup=False, emoji=False)  # a name is a name, whatever it looks like
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = 200
    console.print(table)
    for reason in dict.fromkeys(f"n/a: {row.reason}" for row in rows if row.value is None):
        console.print(reason, soft_wrap=True)
    console.print(f"run folder: {run}", soft_wrap=True)
