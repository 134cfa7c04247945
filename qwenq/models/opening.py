"""Open what the user named as a checkpoint: a folder, a hub id, the bundled model, or random weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwenq.errors import HubError, UsageError
from qwenq.models.bundled import is_bundled
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.folders import local_path
from qwenq.models.unsupported import refuse_to_run
from qwenq.recipe import HUB_ID

if TYPE_CHECKING:
    import torch

Weights = Literal["stored", "random"]


def open_model(
    model: str | None, weights: str = "stored", seed: int = 0, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Open MODEL; its ``notices`` say how it was found.

    Args:
        model: a folder, a hub id, None for the bundled model; with random weights a catalogue name.
        weights: "stored" or "random" (nothing is read or written: tensors are drawn as they are asked for).
        seed: of random weights.
        device: that draws them.
    """
    if weights == "stored":
        resolved = resolve_model(model)
        checkpoint = open_checkpoint(resolved.folder)
        return replace(checkpoint, notices=[*resolved.notices, *checkpoint.notices])
    if weights != "random":
        raise UsageError(f"{weights!r} weights", where="--weights", hint="use stored or random")
    from qwenq.models import catalogue
    from qwenq.models.random_weights import random_checkpoint

    name = catalogue.BUNDLED if model is None or is_bundled(model) else model
    notice = f"random weights (seed {seed}) in the shape of {name}: for speed and memory, not for accuracy"
    return replace(random_checkpoint(name, seed, device=device), notices=[notice])


BUNDLED_NOTICE = (
    "no MODEL given: using the bundled SmolLM2-135M-Instruct; "
    "name a Qwen by its folder or hub id, such as Qwen/Qwen2.5-0.5B-Instruct"
)
_NAME_ONE = "name a folder with config.json, or a hub id like Qwen/Qwen2.5-0.5B"
_ALIKE = 60.0  # of 100: how near a sibling's name has to be to be suggested
_ALIKE_IN_CATALOGUE = 85.0  # nearer: its names differ by a digit


@dataclass(frozen=True)
class Resolved:
    """A model folder that exists, and notices on how it was found."""

    folder: Path
    notices: list[str] = field(default_factory=list)


def resolve_model(model: str | None) -> Resolved:
    """Return the folder of MODEL: an existing folder, a hub id ``owner/name``, None or "bundled".

    An existing folder wins over a hub id of the same spelling.
    """
    if model is None or is_bundled(model):
        from qwenq.models.bundled import bundled_model

        return Resolved(bundled_model(), [BUNDLED_NOTICE] if model is None else [])
    if not model.strip():  # `--model "$UNSET"` must not mean the current folder
        raise UsageError("MODEL is empty", hint=f"leave it out, or {_NAME_ONE}")
    if "\0" in model:  # a recipe can spell it; no disk has such a name
        raise UsageError("MODEL holds a zero byte", where=model, hint=_NAME_ONE)
    path = local_path(model, "MODEL")
    if path.is_dir():
        return Resolved(path)
    if path.suffix == ".gguf" and path.is_file():
        raise UsageError(
            "MODEL is a GGUF file, which is quantised already and is not read here",
            where=path,
            hint="name the folder of the model it was made from: config.json and *.safetensors",
        )
    if path.exists():
        raise UsageError(
            "MODEL is a file, not a folder", where=path, hint=f"name the folder that holds it: {path.parent}"
        )
    if HUB_ID.fullmatch(model):
        refuse_to_run(model)
        from qwenq.models.hub import fetch

        try:
            folder, notice = fetch(model)
        except HubError as error:
            if near := _did_you_mean(path):  # `models/qwem`, a typo, is shaped like a hub id
                error.hint = f"{near} {error.hint or ''}".strip()
            raise
        return Resolved(folder, [notice])
    near = _did_you_mean(path)
    if near is None:
        refuse_to_run(model)
    hints = [hint for hint in (near, _of_catalogue(model)) if hint]
    raise UsageError(
        f"no such model folder: {model}", where=path.absolute(), hint=" ".join(hints) or _NAME_ONE
    )


def _did_you_mean(path: Path) -> str | None:
    """Suggest the sibling folder with the most similar name, if one is near."""
    from rapidfuzz import fuzz, process

    parent = path.parent
    with suppress(OSError):
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
        if found := process.extractOne(path.name, names, scorer=fuzz.ratio, score_cutoff=_ALIKE):
            return f"did you mean the folder {parent / found[0]}?"
    return None


def _of_catalogue(model: str) -> str | None:
    """Return what a name of the catalogue can be used for where weights are needed."""
    from qwenq.models import catalogue

    meant = next(iter(catalogue.suggestions(model, 1, _ALIKE_IN_CATALOGUE)), None)
    if meant is None:
        return None
    asked = "" if meant == model.lower() else f"did you mean {meant}? "
    if meant == catalogue.BUNDLED:
        return f"{asked}{meant} is the bundled model: leave MODEL out"
    return (
        f"{asked}{meant} is a name of the catalogue, which holds no weights: "
        f"name {catalogue.entry(meant).hub_of(meant)} to download them, "
        "or add --weights random for speed and memory"
    )
