"""``qwenq check``: compare a quantised model with its base."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qwenq.checking import SAMPLES, SEQ_LEN
from qwenq.cli import completion
from qwenq.cli.app import app
from qwenq.cli.next import named_base, next_commands, with_model
from qwenq.cli.options import DeviceName, Quiet, RealWeights, Verbose, listed_names, listed_numbers
from qwenq.cli.printing import columns, print_json, table_console
from qwenq.errors import UsageError, VerificationError
from qwenq.progress import StepListener, wrapped

if TYPE_CHECKING:
    from qwenq.checking import Checked


@app.command()
def check(
    quantised: Annotated[
        str,
        typer.Argument(
            help="Quantised model (GPTQ, AWQ, …): folder or hub id.", autocompletion=completion.models
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="The model it was made from. [default: the one that its qwenq.json names]",
            autocompletion=completion.models,
        ),
    ] = None,
    weights: RealWeights = "stored",
    text: Annotated[
        str,
        typer.Option(
            help="Text to measure on: self (the base model writes it); a file of text, JSON, CSV or parquet; "
            "a hub dataset owner/name[:config]; or the held-out part of a set made by `qwenq calibrate`."
        ),
    ] = "self",
    samples: Annotated[int | None, typer.Option(min=1, help=f"Sequences. [default: {SAMPLES}]")] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens of each. [default: {SEQ_LEN}, at most the context]"),
    ] = None,
    device: DeviceName = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto: float32, so that only the rounding of weights is measured."),
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text.")] = 0,
    modules: Annotated[int, typer.Option(min=0, help="Number of the worst modules to list.")] = 8,
    engines: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Only say whether these engines load the folder: vllm, sglang, transformers, gptqmodel, "
            "comma-separated, or all.",
        ),
    ] = None,
    tp: Annotated[
        str, typer.Option("--tp", help="With --for: numbers of GPUs that share the model, comma-separated.")
    ] = "1",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result with all modules as JSON.")
    ] = False,
) -> None:
    """Compare a quantised model with its base.

    Prints KL divergence, share of same top tokens, perplexity and the error of each module; with --for, only
    which engines load the folder.

    The verdict, by mean KL in nats and share of same top tokens; both must reach it:

    \b
    excellent  KL to 0.01, same top from 95 %: a sound Int8
    good       KL to 0.05, same top from 90 %: a sound Int4 of a 7B model
    fair       KL to 0.25, same top from 75 %: a sound Int4 below 1B
    poor       KL to 2, same top from 30 %
    broken     beyond that, or not finite: the exit code is 1
    none       too few tokens to judge by
    """
    from qwenq.checking import check_folders
    from qwenq.cli.progress import with_details

    if engines is not None:
        _check_engines(quantised, engines, tp, as_json=as_json)
        return
    with StepListener(quiet=quiet) as plain, with_details(plain, verbose) as listener:
        found = check_folders(
            quantised,
            against,
            text=text,
            samples=samples,
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            seed=seed,
            listener=listener,
        )
    result = found.result
    if as_json:
        about = {"quantised": str(found.quantised), "base": str(found.base), "format": found.format}
        print_json({**about, "text": text, "seed": seed, "notices": found.notices, **result.to_json()})
    else:
        _print_text(found, text, modules)
    if result.broken:
        raise VerificationError(
            "the quantised model is broken",
            where=found.quantised,
            hint="is it compared with the model it was made from? If so, quantise it again, with --bits 8",
        )
    if not as_json:
        next_commands(*with_model(quantised, against or named_base(found.quantised) or found.base))


def _print_text(found: Checked, text: str, count: int) -> None:
    from rich.text import Text

    result = found.result
    console = table_console(200)
    facts = {
        "quantised": f"{found.quantised} ({found.format})",
        "base": str(found.base),
        "text": f"{text}, {result.sequences} × {result.seq_len} tokens; {result.dtype} on {result.device}",
    }
    verdict_styles = {"excellent": "bold green", "good": "bold green", "fair": "bold yellow", "none": "bold"}
    for name, value in (facts | result.summary()).items():
        style = verdict_styles.get(result.verdict.word, "bold red") if name == "verdict" else ""
        console.print(Text(wrapped(f"{name:<12}{value}", " " * 12), style=style), soft_wrap=True)
    if not (worst := result.worst_modules(count)):
        return
    console.print(
        f"\nworst {len(worst)} of {len(result.modules)} modules, error as a share of the output's energy"
    )
    lines = []
    for module in worst:
        ratio = f"{module.error / module.rtn_error:.2f}" if module.rtn_error else "-"
        lines.append((module.name, f"{module.error:.3%}", f"{module.rtn_error:.3%}", ratio))
    console.print(columns(("module", "error", "round-to-nearest", "ratio"), lines))


def _check_engines(model: str, engines: str, tp: str, *, as_json: bool) -> None:
    """Print whether engines load a folder; the exit code is 1 where one does not on any number of GPUs."""
    from qwenq.models.opening import open_model
    from qwenq.publishing.engines import engine_verdicts, read_gptq_folder

    names = () if engines == "all" else listed_names(engines, "--for")
    gpus = listed_numbers(tp, "--tp", "1,2,4,8")
    if min(gpus) < 1:
        raise UsageError(f"--tp has to be at least 1, not {min(gpus)}", where="--tp", hint="like 1,2,4,8")
    checkpoint = open_model(model)
    verdicts = engine_verdicts(read_gptq_folder(checkpoint), names, gpus)
    if as_json:
        print_json(
            {"model": str(checkpoint.folder), "verdicts": [asdict(v) | {"loads": v.loads} for v in verdicts]}
        )
    else:
        for verdict in verdicts:
            several = f" on {verdict.gpus} GPUs" if verdict.gpus > 1 else ""
            word = "loads" if verdict.loads else "does not load"
            typer.echo(f"{verdict.engine} {verdict.version}{several}: {word}")
            for problem in verdict.problems:
                typer.echo(f"  because {problem.reason}\n  try     {problem.remedy}")
            for line in verdict.notes if verdict.loads else ():
                typer.echo(f"  note    {line}")
    useless = {v.engine for v in verdicts} - {v.engine for v in verdicts if v.loads}
    if useless:
        raise VerificationError(
            f"not loaded by {', '.join(sorted(useless))}",
            where=checkpoint.folder,
            hint="see the reasons above; these are rules for files, no engine was started",
        )
