"""Make or load the calibration set that a recipe or the user names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenq.calibration.calibration_set import CalibrationSet, load_saved, random_tokens
from qwenq.calibration.datasets import is_hub_id, read_folder, read_hub
from qwenq.calibration.documents import Document
from qwenq.calibration.files import ACCEPTED, JSONS, TABLES, TEXTS, bare_suffix, read_file
from qwenq.calibration.sequences import Sizes, check_vocabulary, ids_of, notices_of, pack, read_pool, shuffled
from qwenq.errors import CalibrationError, CorruptFileError, StorageError, UsageError
from qwenq.events import Listener, Notice, Update, counted
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.folders import local_path
from qwenq.models.machine import free_memory
from qwenq.models.qwen_v1 import longest_plain, require_plain
from qwenq.models.random_weights import is_random
from qwenq.models.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from qwenq.recipe import ON_CPU, ON_GPU
from qwenq.storage import cache_folder, readable_bytes

if TYPE_CHECKING:
    from qwenq.recipe import Recipe


def calibration_for(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    listener: Listener,
    fitting: tuple[int, int] | None = None,
) -> CalibrationSet:
    """Load the set or make it.

    Args:
        checkpoint: whose tokenizer it is for, and who writes it where the source is "self".
        device: where the model writes; a GPU is given more text.
        listener: receives what was chosen, and the progress in tokens.
        fitting: sequences and tokens of each, for sizes that the recipe leaves open, where memory is too
            small for the device's usual ones.
    """
    made = _loaded_or_made(recipe, checkpoint, device, listener, fitting)
    facts = made.manifest
    for notice in facts.notices:
        listener(Notice(f"calibration: {notice}"))
    if not facts.held_out:
        raise CalibrationError(
            "this calibration set has no held-out sequences, and the check needs some",
            where=recipe.calibration.source,
            hint="make it again with `qwenq calibrate --held-out 8`",
        )
    if facts.source == "random":
        drawn = f"{facts.samples} × {facts.seq_len} random tokens calibrate them"
        listener(Notice(f"random weights write no text: {drawn}"))
        return made
    own = " (text that the model wrote itself, without network)"
    source = f"{facts.source}{own if facts.source == 'self' else ''}"
    made_of = (
        f"{facts.samples} × {facts.seq_len} tokens ({_why_so_many(recipe, device, fitting)}) from {source}"
    )
    listener(Notice(f"calibration: {made_of}, {facts.held_out} more held out for the check"))
    return made


def _why_so_many(recipe: Recipe, device: torch.device, fitting: tuple[int, int] | None) -> str:
    wanted = recipe.calibration
    if Path(wanted.source).suffix == ".safetensors":
        return "the sizes of that set"
    if wanted.samples != "auto" or wanted.seq_len != "auto":
        return "as asked" if "auto" not in (wanted.samples, wanted.seq_len) else "in part as asked"
    if fitting is not None:
        return "as many as fit the memory"
    if device.type == "cuda":
        return "as many as in GPTQ's paper, where the model takes them: a GPU has the time"
    return "few enough for a CPU; a GPU is given 128 × 2048"


def _loaded_or_made(
    recipe: Recipe,
    checkpoint: Checkpoint,
    device: torch.device,
    listener: Listener,
    fitting: tuple[int, int] | None,
) -> CalibrationSet:
    wanted = recipe.calibration
    saved = Path(wanted.source).suffix == ".safetensors"  # has its own sizes
    samples = None if wanted.samples == "auto" else wanted.samples
    seq_len = None if wanted.seq_len == "auto" else wanted.seq_len
    if not saved:
        usual, length = fitting or (ON_GPU if device.type == "cuda" else ON_CPU)
        samples = usual if samples is None else samples
        longest = longest_plain(checkpoint.config) or length
        seq_len = min(length, longest) if seq_len is None else seq_len
    # Of random weights text means nothing; there may be a tokenizer in the folder that they were written to.
    folder = checkpoint.companions
    textless = is_random(checkpoint.config) and (
        saved or wanted.source == "self" or folder is None or not has_tokenizer(folder)
    )
    label = f"{'writing' if wanted.source == 'self' else 'reading'} text to calibrate and check"
    shown: AbstractContextManager[Update | None] = (
        nullcontext() if textless else counted(listener, label, "tokens")
    )
    with shown as progress:
        return load_calibration(
            wanted.source,
            checkpoint=checkpoint,
            tokenizer=None if textless else calibration_tokenizer(checkpoint.folder, wanted.thinking),
            samples=samples,
            seq_len=seq_len,
            held_out=None if saved else wanted.held_out,
            seed=recipe.quantize.seed,
            split=wanted.split,
            column=wanted.column,
            device=str(device),
            progress=progress,
        )


def calibration_tokenizer(folder: Path, thinking: str) -> Tokenizer:
    """Return the model's tokenizer; ``on`` and ``off`` reach its chat template as ``enable_thinking``.

    A wish that the template cannot fulfil is refused; one that it fulfils anyway needs no switch.
    """
    tokenizer = load_tokenizer(folder)
    if thinking == "auto" or (tokenizer.thinking, thinking) in {("always", "on"), ("never", "off")}:
        return tokenizer
    return tokenizer.with_thinking(thinking == "on")


DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, DEFAULT_HELD_OUT = 32, 512, 8
POOL_CHARACTERS, CHARACTERS_PER_TOKEN = 32_000_000, 16
"""The seed chooses among the first documents of a source: as many as hold POOL_CHARACTERS, or
CHARACTERS_PER_TOKEN for each token that is needed, whichever is more. What comes after them is not read."""
LENGTH = "the length of this set's sequences"
_SELF_TEXT_RULE = 1  # counts up when the same settings would write another text

_BYTES_OF_TOKEN = 32  # int64, once more while sequences are put together, and as much for their numbers

_SUFFIXES = {*JSONS, *TABLES, *TEXTS, ".parquet"} - {""}

_log = logging.getLogger(__name__)


def load_calibration(
    spec: str,
    *,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    samples: int | None = None,
    seq_len: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    split: str | None = None,
    column: str | None = None,
    device: str = "cpu",
    progress: Update | None = None,
) -> CalibrationSet:
    """Make or load the calibration set that ``spec`` names.

    Args:
        spec: ``self`` (the model writes its own text), a file (.txt, .jsonl, .json, .parquet), a saved set
            (.safetensors), or a hub dataset ``owner/name[:config]``. An existing file wins over a hub id.
        checkpoint: the unquantised model; its vocabulary bounds the tokens.
        tokenizer: that model's tokenizer; None: its weights are random, and ``self`` is random tokens.
        samples, seq_len, held_out: None: 32, 512 (less where the model takes less), 8. A saved set has its
            own; a different number is an error.
        seed: which documents, or which text.
        split, column: of a hub dataset or a table; None: ``train``, and the first of text, messages,
            conversations.
        device: where ``self`` runs the model.
        progress: called with (tokens done, tokens in all).

    Raises:
        UsageError: nothing that can be read is named, or options contradict it.
        CalibrationError: empty, too short, damaged, or not of this model.
    """
    if Path(spec).suffix == ".safetensors":
        if split is not None or column is not None:
            raise UsageError(
                "a saved set has no split or column: its text was read when it was made",
                where=spec,
                hint="leave both out",
            )
        return _load_saved_for(Path(spec), checkpoint, tokenizer, (samples, seq_len, held_out))
    wanted = _wanted_sizes(checkpoint, samples, seq_len, held_out)
    if tokenizer is None:
        if spec != "self" or split is not None or column is not None:
            raise UsageError(
                "a model with random weights has no tokenizer to read a text",
                where=spec,
                hint="leave --calibration out (`qwenq calibrate`: --source, --split, --column): tokens are "
                "random, too",
            )
        return random_tokens(int(checkpoint.config["vocab_size"]), wanted, seed)
    if spec == "self":
        if split is not None or column is not None:
            raise UsageError("the model's own text has no split or column", hint="leave both out")
        return _self_written(checkpoint, tokenizer, wanted, seed, device, progress)
    documents = _open(spec, split, column)
    return _from_documents(spec, documents, checkpoint, tokenizer, wanted, seed, progress)


def _wanted_sizes(
    checkpoint: Checkpoint, samples: int | None, seq_len: int | None, held_out: int | None
) -> Sizes:
    """Return how much to make; None: the defaults, and no longer sequences than the model takes.

    What no set can have, what memory does not hold and sequences too long for the model are refused.
    """
    usual = min(DEFAULT_SEQ_LEN, longest_plain(checkpoint.config) or DEFAULT_SEQ_LEN)
    wanted = Sizes(
        samples=DEFAULT_SAMPLES if samples is None else samples,
        held_out=DEFAULT_HELD_OUT if held_out is None else held_out,
        seq_len=usual if seq_len is None else seq_len,
    )
    limits = (
        ("samples", wanted.samples, 1),
        ("seq-len", wanted.seq_len, 2),
        ("held-out", wanted.held_out, 0),
    )
    for name, value, least in limits:
        if value < least:
            raise UsageError(f"--{name} is {value}", hint=f"it has to be at least {least}")
    require_plain(checkpoint.config, wanted.seq_len, option="--seq-len", where=checkpoint.folder)
    needed, free = wanted.tokens * _BYTES_OF_TOKEN, free_memory()
    if needed > free:
        raise UsageError(
            f"{wanted.samples} + {wanted.held_out} sequences of {wanted.seq_len} tokens take "
            f"{readable_bytes(needed)} of memory, {readable_bytes(free)} are free",
            hint="lower --samples or --seq-len",
        )
    return wanted


def _open(spec: str, split: str | None, column: str | None) -> Iterator[Document]:
    path = local_path(spec, "the text")
    if not path.exists() and is_hub_id(spec) and bare_suffix(path) not in _SUFFIXES:
        return read_hub(spec, split, column)
    if not path.exists():
        raise UsageError(
            f"no such text: {spec}",
            where=path.absolute(),
            hint=f"self, a hub dataset (owner/name), a file ({ACCEPTED}), a folder of such files, or a "
            ".safetensors set from `qwenq calibrate`",
        )
    if path.is_dir():
        return read_folder(path, split, column)
    if split is not None:
        raise UsageError("a file has no splits", where=path, hint="leave the split out")
    return read_file(path, column)


def _from_documents(
    spec: str,
    documents: Iterator[Document],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    wanted: Sizes,
    seed: int,
    progress: Update | None,
) -> CalibrationSet:
    # imported here: it loads transformers, which reading files does not need
    from qwenq.calibration.self_text import separator_of

    pool, read_to_end = read_pool(documents, max(POOL_CHARACTERS, CHARACTERS_PER_TOKEN * wanted.tokens))
    if not pool:
        raise CalibrationError("the text is empty", where=spec, hint="give one with words in it")
    separator = separator_of(tokenizer)
    ids = (ids_of(document, tokenizer) for document in shuffled(pool, seed))
    packed = pack(ids, wanted, [] if separator is None else [separator], where=spec, progress=progress)
    for tokens in (packed.tokens, packed.held_out):
        check_vocabulary(tokens, int(checkpoint.config["vocab_size"]), spec)
    texts = sum(isinstance(document.content, str) for document in pool)
    return CalibrationSet.of(
        packed.tokens,
        packed.held_out,
        source=spec,
        template="plain" if texts == len(pool) else "chat" if texts == 0 else "mixed",
        seed=seed,
        held_out_from=packed.held_out_from,
        documents=packed.documents,
        documents_read=len(pool),
        source_read_to_end=read_to_end,
        tokenizer=tokenizer.fingerprint,
        notices=notices_of(pool, tokenizer),
    )


def _self_written(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    wanted: Sizes,
    seed: int,
    device: str,
    progress: Update | None,
) -> CalibrationSet:
    from qwenq.calibration.self_text import HELD_OUT_ROWS, require_base_model, write_self_text

    require_base_model(checkpoint)
    path = self_text_path(checkpoint, tokenizer, wanted, seed, device)
    if (cached := _from_cache(path)) is not None:
        return cached
    rows = [*range(wanted.samples), *range(HELD_OUT_ROWS, HELD_OUT_ROWS + wanted.held_out)]
    text = write_self_text(
        checkpoint, tokenizer, rows, wanted.seq_len, seed=seed, device=device, progress=progress
    )
    made = CalibrationSet.of(
        text[: wanted.samples].clone(),
        text[wanted.samples :].clone(),
        source="self",
        template="self",
        seed=seed,
        held_out_from="other random streams" if wanted.held_out else "none",
        tokenizer=tokenizer.fingerprint,
        model=checkpoint.fingerprint,
    )
    try:
        made.save(path)
    except StorageError as error:  # the text itself is fine: a read-only home must not cost a minute's work
        _log.warning("the model's text is not kept for the next run: %s", error)
    return made


def self_text_path(
    checkpoint: Checkpoint, tokenizer: Tokenizer, wanted: Sizes, seed: int, device: str
) -> Path:
    """Return where the model's own text is cached: the name is a hash of all that decides the text."""
    from qwenq.models.machine import product_dtype

    decides: list[Any] = [
        _SELF_TEXT_RULE,
        checkpoint.fingerprint,
        tokenizer.fingerprint,
        asdict(wanted),
        seed,
        torch.device(device).type,
        str(product_dtype(device)),
    ]
    name = hashlib.sha256(repr(decides).encode()).hexdigest()[:16]
    return cache_folder() / "self-text" / f"{name}.safetensors"


def _from_cache(path: Path) -> CalibrationSet | None:
    """Return the text in the cache; None where it is missing or damaged, and has to be written again."""
    if not path.is_file():
        return None
    try:
        return CalibrationSet.load(path)
    except (CalibrationError, CorruptFileError) as error:
        _log.warning("writing the model's text again: %s", error)
        return None


def _load_saved_for(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    asked: tuple[int | None, int | None, int | None],
) -> CalibrationSet:
    loaded = load_saved(path, int(checkpoint.config["vocab_size"]), asked)
    require_plain(checkpoint.config, loaded.manifest.seq_len, option=LENGTH, where=path)
    if tokenizer is not None and loaded.manifest.tokenizer != tokenizer.fingerprint:
        raise CalibrationError(
            "this calibration set was made with another tokenizer",
            where=path,
            hint=f"make one for this model: `qwenq calibrate {checkpoint.folder}`",
        )
    return loaded
