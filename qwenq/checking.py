"""Compare a quantised model with its base: open both, choose the text, measure.

``qwenq check`` and ``qwenq.check`` are thin layers over ``check_folders``.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import QwenqError, UsageError
from qwenq.events import Event, Listener, Notice, counted, notify, silent

if TYPE_CHECKING:
    import torch

    from qwenq.evals.check import CheckResult
    from qwenq.models.checkpoint import Checkpoint
    from qwenq.models.tokenizer import Tokenizer

SAMPLES, SEQ_LEN = 8, 512


@dataclass(frozen=True)
class Checked:
    """A quantised model beside its base, and what was measured."""

    quantised: Path
    base: Path
    format: str  # how the weights are quantised, such as "Int4, groups of 128"
    result: CheckResult
    notices: list[str]  # how the base was found, and what limits the comparison


def check_folders(
    quantised: str,
    against: str | None = None,
    *,
    text: str = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    listener: Listener = silent,
) -> Checked:
    """Measure what quantising cost a model: KL divergence, same top token, perplexity, error by module.

    Args:
        quantised: a GPTQ model or one of another tool that is read: folder or hub id.
        against: the model that it was made from; None: the one that its qwenq.json names.
        text: "self" (the base writes it), a file, a hub dataset, or a set by `qwenq calibrate`.
        samples: sequences; None: SAMPLES.
        seq_len: tokens of each; None: SEQ_LEN, or fewer where the model takes fewer.
        device: as ``--device``.
        dtype: "auto" is float32: in 16 bits the roundings of both models would be counted as damage, too.
        seed: chooses the text.
        listener: receives notices and the progress.

    Raises:
        UsageError: not a quantised model, no base, or not this base; a text that is too short.
        QwenqError: one of the models cannot be read.
    """
    import torch

    from qwenq.evals.check import check
    from qwenq.models.machine import resolve_device

    def keep(event: Event) -> None:
        if isinstance(event, Notice):
            pair.notices.append(event.text)
        listener(event)

    place = resolve_device(device)
    pair = _open_pair(quantised, against)
    held_out = _held_out(text, pair, samples, seq_len, seed, str(place), listener)
    notify(listener, pair.notices)
    number: torch.dtype = getattr(torch, "float32" if dtype == "auto" else dtype)
    result = check(pair.quantised, pair.base, held_out, device=place, dtype=number, listener=keep)
    groups = "whole rows" if result.group_size == -1 else f"groups of {result.group_size}"
    foreign = pair.quantised.foreign
    name = f"Int{result.bits}, {groups}" if foreign is None else foreign.format.name
    return Checked(pair.quantised.folder, pair.base.folder, name, result, pair.notices)


@dataclass
class _Pair:
    """Both models; ``calibration``: what qwenq.json says of the text that the first was made with."""

    quantised: Checkpoint
    base: Checkpoint
    calibration: dict[str, Any]
    notices: list[str]


def _open_pair(quantised: str, against: str | None) -> _Pair:
    """Open both models, and require that they are sound and of one shape."""
    from qwenq.evals.check import require_comparable, require_quantised
    from qwenq.models.gptq_format import validate_quantised
    from qwenq.models.opening import open_model

    packed = open_model(quantised)
    require_quantised(packed)  # before its base is looked for: that of random weights lies on no disk
    calibration = _verified_calibration(packed.folder)
    base = _open_base(against, packed.folder)
    pair = _Pair(packed, base, calibration, [*packed.notices, *base.notices])
    quant = require_comparable(packed, base)
    if packed.foreign is None:
        validate_quantised(packed.source, quant)
    _compare_fingerprint(pair, explicit=against is not None)
    return pair


def _verified_calibration(folder: Path) -> dict[str, Any]:
    """Return what qwenq.json says of the calibration, once every file that it lists has the recorded hash."""
    from qwenq.models.folders import MANIFEST
    from qwenq.models.integrity import verify_files
    from qwenq.storage import read_json

    if not (folder / MANIFEST).is_file():
        return {}
    verify_files(folder)
    used = read_json(folder / MANIFEST).get("calibration")
    return used if isinstance(used, dict) else {}


def _open_base(against: str | None, quantised: Path) -> Checkpoint:
    """Open the base; its notices say how it was found."""
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import base_of, local_base
    from qwenq.models.opening import open_model, resolve_model

    if against is not None:
        return open_model(against)
    named = base_of(quantised)
    if "model" not in named:
        raise UsageError(
            "which model was this made from? It has no qwenq.json that names it",
            where=quantised,
            hint="name it: --against BASE",
        )
    if named.get("folder"):
        return open_checkpoint(local_base(named, quantised))
    try:
        resolved = resolve_model(named["model"])
    except QwenqError as error:
        error.what = f"the base that qwenq.json names cannot be opened: {error.what}"
        error.hint = f"name it: --against BASE{f'; or {error.hint}' if error.hint else ''}"
        raise
    found = ["the base is the bundled model"] if named["model"] is None else resolved.notices
    base = open_checkpoint(resolved.folder)
    return replace(base, notices=[*found, *base.notices])


def _compare_fingerprint(pair: _Pair, *, explicit: bool) -> None:
    """Require that the base is the one that was quantised, unless the user chose it."""
    from qwenq.models.identity import base_of

    wanted = base_of(pair.quantised.folder).get("fingerprint")
    if wanted is None or wanted == pair.base.fingerprint:
        return
    found = f"its fingerprint is {pair.base.fingerprint}, qwenq.json says {wanted}"
    if not explicit:
        raise UsageError(
            f"the base has changed since it was quantised: {found}",
            where=pair.base.folder,
            hint="name that model with --against BASE, or quantise again",
        )
    pair.notices.append(f"this is not the base that was quantised: {found}")


def _held_out(
    text: str,
    pair: _Pair,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    device: str,
    listener: Listener,
) -> torch.Tensor:
    """Return sequences that calibration does not use: int64 [samples, seq_len]."""
    from qwenq.calibration import load_calibration
    from qwenq.models.qwen_v1 import longest_plain
    from qwenq.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(pair.base.folder)
    if text.endswith(".safetensors"):
        made = load_calibration(text, checkpoint=pair.base, tokenizer=tokenizer, seq_len=seq_len)
        if len(made.held_out) < (samples or 1):
            raise UsageError(
                f"{samples or 1} held-out sequences are needed, this set has {len(made.held_out)}",
                where=text,
                hint="lower --samples, or make a set with more: `qwenq calibrate … --held-out`",
            )
        return made.held_out[:samples]
    longest = longest_plain(pair.base.config) or SEQ_LEN
    rows, length = samples or SAMPLES, seq_len or min(SEQ_LEN, longest)
    _note_overlap(text, pair, {"held_out": rows, "seq_len": length, "seed": seed})
    label = "writing text" if text == "self" else "reading text"
    with counted(listener, label, "tokens") as progress:
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
    """Return how many calibration sequences to ask for: as many as the model had, if they are cached.

    Its held-out rows are then there already. Otherwise one, the least there can be.
    """
    from qwenq.calibration.load import self_text_path
    from qwenq.calibration.sequences import Sizes

    made_with = pair.calibration.get("samples")
    if text != "self" or not isinstance(made_with, int):
        return 1
    wanted = Sizes(samples=made_with, held_out=rows, seq_len=length)
    return made_with if self_text_path(pair.base, tokenizer, wanted, seed, device).is_file() else 1


def _note_overlap(text: str, pair: _Pair, wanted: dict[str, int]) -> None:
    """Add a notice where a text that calibrated the model is cut in another way: parts may come up again.

    The model's own text cannot: held-out rows have random streams of their own.
    """
    used = pair.calibration
    if text == "self" or not _same_text(text, used.get("source")):
        return
    if any(used.get(key) != value for key, value in wanted.items()):
        pair.notices.append(
            "this text calibrated the model and is cut differently here, so parts of it may be seen again; "
            f"it was made with seed {used.get('seed')}, {used.get('held_out')} held-out sequences "
            f"of {used.get('seq_len')}"
        )


def _same_text(text: str, source: object) -> bool:
    """Return whether two names stand for one text: they are spelt alike, or are one file."""
    if not isinstance(source, str) or text == source:
        return text == source
    with suppress(OSError, ValueError):
        return Path(text).samefile(source)
    return False
