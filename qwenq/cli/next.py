"""Suggest the commands that go on from what a command made: each of them has to work as it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qwenq.cli.printing import as_typed
from qwenq.errors import QwenqError, visible
from qwenq.stopping import is_child

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint

Words = Sequence[str | Path | None]


def next_commands(*commands: Words) -> None:
    """Print commands that go on from here, ready to copy; words that are None are left out.

    On standard error, so that what is piped on holds results alone. A step of `qwenq run` prints none: the
    next step is what follows.
    """
    if is_child():
        return
    for label, command in zip(("next:", *[""] * len(commands)), commands, strict=False):
        words = [str(word) for word in command if word is not None]
        program = [] if words[0] == "vllm" else ["qwenq"]
        typer.echo(f"{label:<6}{visible(as_typed([*program, *words]))}", err=True)


def with_model(folder: str | Path, base: str | Path | None = None) -> Iterator[Words]:
    """Yield commands for a model folder: chat, evaluate, profile, serve; without those that refuse it.

    Args:
        folder: as the user can type it.
        base: the model that it was made from, which it is compared with.
    """
    from qwenq.models.opening import open_model
    from qwenq.models.random_weights import is_random
    from qwenq.models.shapes import ModelShape
    from qwenq.models.tokenizer import load_tokenizer
    from qwenq.runtime.chat import require_chat
    from qwenq.runtime.spec import read_spec

    checkpoint = open_model(str(folder))
    config = checkpoint.config
    engine = () if _works(lambda: read_spec(config)) else ("--engine", "transformers")
    if is_random(config):
        yield ("profile", folder, *engine)
        return
    if _works(lambda: require_chat(load_tokenizer(checkpoint.folder))):
        yield ("chat", folder, *engine)
    yield ("eval", base, folder, *engine, *(("--sample",) if base == "bundled" else ()))
    # Other tools' formats have no speed here: they are dequantised at load.
    if checkpoint.foreign is None and _works(lambda: ModelShape.from_config(config)):
        yield ("profile", None if base is not None and _is_foreign(base) else base, folder, *engine)
    if _loads_in_vllm(checkpoint):
        yield ("vllm", "serve", folder)


def _works(check: Callable[[], object]) -> bool:
    try:
        check()
    except QwenqError:
        return False
    return True


def named_base(quantised: Path) -> str | Path | None:
    """Return the model that a folder was quantised from, as a command takes it; None: unknown."""
    from qwenq.models.identity import base_of, local_base

    try:
        named = base_of(quantised)
        if named.get("folder"):
            return local_base(named, quantised)
    except QwenqError:  # a damaged manifest, or a base that has gone
        return None
    return (named["model"] or "bundled") if "model" in named else None


def _is_foreign(base: str | Path) -> bool:
    """Return whether a base lies here in another tool's format; one on the hub was read as it is."""
    from qwenq.models.checkpoint import open_checkpoint

    folder = Path(base).expanduser()
    return folder.is_dir() and open_checkpoint(folder).foreign is not None


def _loads_in_vllm(checkpoint: Checkpoint) -> bool:
    from qwenq.models.gptq_config import is_quantised
    from qwenq.publishing.engines import engine_verdicts, read_gptq_folder

    if not is_quantised(checkpoint.config) or checkpoint.foreign is not None:
        return False
    return all(each.loads for each in engine_verdicts(read_gptq_folder(checkpoint), ["vllm"]))
