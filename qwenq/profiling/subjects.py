"""List the models of a sweep: a quantised one in its own precision, others in each that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import is_quantised
from qwenq.models.resolve import BUNDLED_NOTICE
from qwenq.models.shapes import ModelShape
from qwenq.profiling.points import BITS, PRECISIONS, Subject, Weights
from qwenq.results import Model

BUNDLED_WORD = "bundled"
"""Name of the bundled model on the command line, where no folder has that name."""


@dataclass
class Subjects:
    """The models of a sweep.

    Attributes:
        shapes: by model name.
        notices: for the user, one line each.
        plain: names of unquantised models by fingerprint.
        bases: fingerprints that manifests of quantised models name, by model name.
    """

    subjects: list[Subject] = field(default_factory=list)
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)


def subjects_of(
    models: Sequence[str | None], precisions: Sequence[str], weights: Weights = "stored", seed: int = 0
) -> Subjects:
    """Open the models and list the precisions to measure of each.

    Raises:
        UsageError: no such precision or model, or one is named twice.
        QwenqError: a model cannot be read.
    """
    if wrong := [name for name in precisions if name not in PRECISIONS]:
        hint = f"use {', '.join(PRECISIONS)}"
        raise UsageError(f"there is no precision {wrong[0]!r}", where="--precision", hint=hint)
    found = Subjects()
    for given in models:
        bundled = given == BUNDLED_WORD and not Path(given).exists()
        _add(found, None if bundled else given, precisions, weights, seed)
        if bundled:  # it was named, so no notice is needed
            found.notices = [notice for notice in found.notices if notice != BUNDLED_NOTICE]
    found.subjects = [_settled(each, found) for each in found.subjects]
    return found


def _add(found: Subjects, given: str | None, precisions: Sequence[str], weights: Weights, seed: int) -> None:
    from qwenq.models.identity import base_of
    from qwenq.models.opening import open_model

    checkpoint = open_model(given, weights, seed)
    found.notices += checkpoint.notices
    shape = ModelShape.from_config(checkpoint.config)
    made = _quantised(checkpoint, given, weights, seed) or [
        _plain(checkpoint, shape, given, weights, seed, precision) for precision in precisions
    ]
    name = made[0].model.name
    if name in found.shapes:
        raise UsageError(f"two models are called {name}", where=given, hint="rename one of the folders")
    found.shapes[name] = shape
    found.subjects += made
    if not checkpoint.on_disk:  # to know random weights by their bytes, all would have to be drawn
        return
    if not is_quantised(checkpoint.config):
        found.plain[checkpoint.fingerprint] = made[0].model.family
    elif isinstance(base := base_of(checkpoint.folder).get("fingerprint"), str):
        found.bases[name] = base


def _settled(subject: Subject, found: Subjects) -> Subject:
    """Return it in the family of the base that its manifest names by fingerprint, as evaluations do.

    The base's folder may have been renamed since.
    """
    family = found.plain.get(found.bases.get(subject.model.name, ""))
    return subject if family is None else replace(subject, model=replace(subject.model, family=family))


def _quantised(checkpoint: Checkpoint, given: str | None, weights: Weights, seed: int) -> list[Subject]:
    """Return a quantised folder in its own precision, whatever others were asked for; else nothing."""
    import torch

    from qwenq.models.identity import result_model

    if not is_quantised(checkpoint.config):
        return []
    return [Subject(given, weights, seed, None, "auto", result_model(checkpoint, torch.float32, given))]


def _plain(
    checkpoint: Checkpoint, shape: ModelShape, given: str | None, weights: Weights, seed: int, precision: str
) -> Subject:
    import torch

    from qwenq.models.catalogue import BUNDLED
    from qwenq.models.identity import result_model
    from qwenq.profiling.rounded import group_size_for

    name = given or BUNDLED if weights == "random" else given
    if precision not in BITS:
        model = result_model(checkpoint, getattr(torch, PRECISIONS[precision]), name)
        return Subject(given, weights, seed, None, PRECISIONS[precision], model)
    bits, group_size = BITS[precision], group_size_for(shape)
    base = result_model(checkpoint, torch.bfloat16, name)
    model = Model(
        name=base.name,
        fingerprint=f"rounded-{bits}-{group_size}:{base.fingerprint}",
        precision=precision,
        family=base.family,
        nbytes=shape.quantised_bytes(bits, group_size),
        group_size=group_size,
    )
    return Subject(given, weights, seed, bits, "auto", model)
