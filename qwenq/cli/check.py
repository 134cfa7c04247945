"""``qwenq check``: compare a quantised model with its base."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qwenq.cli.app import app
from qwenq.cli.options import DeviceName, Quiet, RealWeights
from qwenq.cli.printing import next_commands, notes, print_json, table_console
from qwenq.errors import QwenqError, UsageError, VerificationError

if TYPE_CHECKING:
    import torch

    from qwenq.evals.result import CheckResult
    from qwenq.models.checkpoint import Checkpoint
    from qwenq.models.tokenizer import Tokenizer

_SAMPLES, _SEQ_LEN = 8, 512


@app.command()
def check(
    quantised: Annotated[str, typer.Argument(help="GPTQ model: folder or hub id.")],
    against: Annotated[
        str | None,
        typer.Option(help="The model it was made from. [default: the one that its qwenq.json names]"),
    ] = None,
    weights: RealWeights = "stored",
    text: Annotated[
        str,
        typer.Option(
            help="Text to measure on: self (the base model writes it); a file of text, JSON, CSV or parquet; "
            "a hub dataset owner/name[:config]; or the held-out part of a set made by `qwenq calibrate`."
        ),
    ] = "self",
    samples: Annotated[int | None, typer.Option(min=1, help=f"Sequences. [default: {_SAMPLES}]")] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens of each. [default: {_SEQ_LEN}, at most the context]"),
    ] = None,
    device: DeviceName = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto: float32, so that only the rounding of weights is measured."),
    ] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text.")] = 0,
    modules: Annotated[int, typer.Option(min=0, help="Number of the worst modules to list.")] = 8,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result with all modules as JSON.")
    ] = False,
) -> None:
    """Compare a quantised model with its base.

    Prints KL divergence, share of same top tokens, perplexity and the error of each module.

    The verdict, by mean KL in nats and share of same top tokens; both must reach it:

    \b
    excellent  KL to 0.01, same top from 95 %: a sound Int8
    good       KL to 0.05, same top from 90 %: a sound Int4 of a 7B model
    fair       KL to 0.25, same top from 75 %: a sound Int4 below 1B
    poor       KL to 2, same top from 30 %
    broken     beyond that, or not finite: the exit code is 1
    """
    from qwenq.cli.progress import show_progress
    from qwenq.evals.check import check as run
    from qwenq.models.opening import refuse_random_weights
    from qwenq.models.precision import resolve_device

    refuse_random_weights(weights)
    chosen = resolve_device(device)
    pair = _open_pair(quantised, against)
    held_out = _held_out(text, pair, samples, seq_len, seed, str(chosen), quiet=quiet)
    notes(pair.notices)
    found: list[str] = []
    with show_progress("checking", "steps", quiet=quiet) as progress:
        result = run(
            pair.quantised,
            pair.base,
            held_out,
            device=chosen,
            dtype=_dtype(dtype),
            progress=progress,
            say=found.append,
        )
    notes(found)
    pair.notices += found
    if as_json:
        _print_json(result, pair, text, seed)
    else:
        _print_text(result, pair, text, modules)
    if result.broken:
        raise VerificationError(
            "the quantised model is broken",
            where=pair.quantised.folder,
            hint="is it compared with the model it was made from? If so, quantise it again, with --bits 8",
        )
    if not as_json:
        next_commands(("eval", against or pair.base.folder, quantised), ("chat", quantised))


@dataclass
class _Pair:
    quantised: Checkpoint
    base: Checkpoint
    manifest: dict[str, Any] | None
    notices: list[str] = field(default_factory=list)


def _open_pair(quantised: str, against: str | None) -> _Pair:
    """Open both models, and verify that they are sound and of one shape."""
    from qwenq.evals.check import require_comparable
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.gptq_format import is_quantised, validate_quantised
    from qwenq.models.random_weights import refuse_random
    from qwenq.models.resolve import resolve_model

    resolved = resolve_model(quantised)
    packed = open_checkpoint(resolved.folder)
    if not is_quantised(packed.config):
        raise UsageError(
            "this model is not quantised, so there is nothing to check",
            where=resolved.folder,
            hint="the quantised model comes first: `qwenq check QUANTISED --against BASE`",
        )
    refuse_random(packed.config, "accuracy")  # before its base is looked for: that one lies on no disk
    manifest = _verified_manifest(resolved.folder)
    folder, notices = _find_base(against, resolved.folder)
    pair = _Pair(packed, open_checkpoint(folder), manifest)
    pair.notices = [*resolved.notices, *packed.notices, *notices, *pair.base.notices]
    quant = require_comparable(packed, pair.base)
    validate_quantised(packed.source, quant)
    _compare_fingerprint(pair, explicit=against is not None)
    return pair


def _verified_manifest(folder: Path) -> dict[str, Any] | None:
    """Return qwenq.json, with every file that it lists verified; None without one."""
    import json

    from qwenq.models.integrity import verify_files
    from qwenq.models.manifest import MANIFEST

    if not (folder / MANIFEST).is_file():
        return None
    verify_files(folder)
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def _find_base(against: str | None, quantised: Path) -> tuple[Path, list[str]]:
    """Return the base's folder, and notices about how it was found."""
    from qwenq.models.identity import base_of, local_base
    from qwenq.models.resolve import resolve_model

    if against is not None:
        resolved = resolve_model(against)
        return resolved.folder, resolved.notices
    named = base_of(quantised)
    if "model" not in named:
        raise UsageError(
            "which model was this made from? No qwenq.json names it",
            where=quantised,
            hint="name it: --against BASE",
        )
    if named.get("folder"):
        return local_base(named, quantised), []
    try:
        resolved = resolve_model(named["model"])
    except QwenqError as error:
        error.what = f"the base that qwenq.json names cannot be opened: {error.what}"
        error.hint = f"name it: --against BASE{f'; or {error.hint}' if error.hint else ''}"
        raise
    bundled = named["model"] is None
    return resolved.folder, ["the base is the bundled model"] if bundled else resolved.notices


def _compare_fingerprint(pair: _Pair, *, explicit: bool) -> None:
    """Raise UsageError unless the base is the one that was quantised; add a notice if the user named it."""
    from qwenq.models.identity import base_of

    wanted = base_of(pair.quantised.folder).get("fingerprint")
    if wanted is None or wanted == pair.base.fingerprint:
        return
    if not explicit:
        raise UsageError(
            f"the base has changed since it was quantised: its fingerprint is {pair.base.fingerprint}, "
            f"qwenq.json says {wanted}",
            where=pair.base.folder,
            hint="name the original model with --against BASE, or quantise again",
        )
    pair.notices.append(
        f"this is not the base that was quantised: its fingerprint is {pair.base.fingerprint}, "
        f"qwenq.json says {wanted}"
    )


def _held_out(
    text: str,
    pair: _Pair,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    device: str,
    *,
    quiet: bool,
) -> torch.Tensor:
    """Return sequences that calibration does not use: int64 [samples, seq_len]."""
    from qwenq.calibration import load_calibration
    from qwenq.cli.progress import show_progress
    from qwenq.models.long_context import longest_plain
    from qwenq.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pair.base.folder)
    if text.endswith(".safetensors"):
        made = load_calibration(text, checkpoint=pair.base, tokenizer=tokenizer, seq_len=seq_len)
        held_out = made.held_out
        if len(held_out) < (samples or 1):
            raise UsageError(
                f"{samples or 1} held-out sequences are needed, this set has {len(held_out)}",
                where=text,
                hint="lower --samples, or make a set with more: `qwenq calibrate … --held-out`",
            )
        return held_out[:samples]
    longest = longest_plain(pair.base.config) or _SEQ_LEN
    rows, length = samples or _SAMPLES, seq_len or min(_SEQ_LEN, longest)
    _note_overlap(text, pair, {"held_out": rows, "seq_len": length, "seed": seed})
    with show_progress("writing text" if text == "self" else "reading text", quiet=quiet) as progress:
        made = load_calibration(
            text,
            checkpoint=pair.base,
            tokenizer=tokenizer,
            samples=_unused_samples(text, pair, tokenizer, rows, length, seed, device),
            held_out=rows,
            seq_len=length,
            seed=seed,
            device=device,
            progress=progress,
        )
    return made.held_out


def _unused_samples(
    text: str, pair: _Pair, tokenizer: Tokenizer, rows: int, length: int, seed: int, device: str
) -> int:
    """Return the number of calibration sequences to request: that of the model's calibration if it is cached.

    The held-out sequences are then cached too. Otherwise 1, the minimum.
    """
    from qwenq.calibration.load import self_text_path
    from qwenq.calibration.sequences import Wanted

    used = (pair.manifest or {}).get("calibration")
    made_with = used.get("samples") if isinstance(used, dict) else None
    if text != "self" or not isinstance(made_with, int):
        return 1
    wanted = Wanted(samples=made_with, held_out=rows, seq_len=length)
    return made_with if self_text_path(pair.base, tokenizer, wanted, seed, device).is_file() else 1


def _note_overlap(text: str, pair: _Pair, wanted: dict[str, int]) -> None:
    """Add a notice where the calibration text is cut differently, so that parts of it may be seen again.

    With self-written text that cannot happen: held-out sequences have separate random streams.
    """
    used = (pair.manifest or {}).get("calibration")
    if not isinstance(used, dict) or text == "self" or not _same_text(text, used.get("source")):
        return
    if any(used.get(key) != value for key, value in wanted.items()):
        pair.notices.append(
            "this text calibrated the model and is cut differently here, so parts of it may be seen again; "
            f"it was made with seed {used.get('seed')}, {used.get('held_out')} held-out sequences "
            f"of {used.get('seq_len')}"
        )


def _same_text(text: str, source: object) -> bool:
    """Return whether two names are equal or name the same file."""
    if not isinstance(source, str) or text == source:
        return text == source
    with suppress(OSError, ValueError):
        return Path(text).samefile(source)
    return False


def _dtype(name: str) -> torch.dtype:
    """Return the dtype; auto is float32: in 16 bits both models' rounding would be measured too."""
    import torch

    found: torch.dtype = getattr(torch, "float32" if name == "auto" else name)
    return found


def _print_json(result: CheckResult, pair: _Pair, text: str, seed: int) -> None:
    about = {
        "quantised": str(pair.quantised.folder),
        "base": str(pair.base.folder),
        "text": text,
        "seed": seed,
        "notices": pair.notices,
    }
    print_json({**about, **result.to_json()})


def _print_text(result: CheckResult, pair: _Pair, text: str, count: int) -> None:
    from rich.table import Table
    from rich.text import Text

    console = table_console(200)
    groups = "whole rows" if result.group_size == -1 else f"groups of {result.group_size}"
    lines = {
        "quantised": f"{pair.quantised.folder} (Int{result.bits}, {groups})",
        "base": str(pair.base.folder),
        "text": f"{text}, {result.sequences} × {result.seq_len} tokens; {result.dtype} on {result.device}",
    }
    verdict_styles = {"excellent": "bold green", "good": "bold green", "fair": "bold yellow"}
    for name, value in (lines | result.summary()).items():
        style = verdict_styles.get(result.verdict.word, "bold red") if name == "verdict" else ""
        console.print(Text(f"{name:<12}{value}", style=style), soft_wrap=True)
    if not (worst := result.worst_modules(count)):
        return
    console.print(
        f"\nworst {len(worst)} of {len(result.modules)} modules, error as a share of the output's energy"
    )
    table = Table("module", box=None, pad_edge=False)
    for title in ("error", "round-to-nearest", "ratio"):
        table.add_column(title, justify="right")
    for module in worst:
        ratio = f"{module.error / module.rtn_error:.2f}" if module.rtn_error else "-"
        table.add_row(module.name, f"{module.error:.3%}", f"{module.rtn_error:.3%}", ratio)
    console.print(table)
