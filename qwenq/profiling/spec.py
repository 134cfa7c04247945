"""Define what a sweep measures: models in precisions, and points, each with attention, engine and length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import is_quantised
from qwenq.models.shapes import ModelShape
from qwenq.results import Model, Row, Status, Value

Weights = Literal["stored", "random"]
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "auto", "int4": "auto"}
"""Precision → dtype to compute in."""
BITS = {"int8": 8, "int4": 4}
MOST_TOKENS = 10**9

GENERATING = {
    "memory.load": "bytes",
    "speed.protocol": "tokens/s",
    "memory.generate": "bytes",
    "memory.unreset": "bytes",
    "energy.token": "joules/token",
    "speed.decode": "tokens/s",
    "time.first_token": "seconds",
    "bandwidth.share": "ratio",
}
ENCODING = {
    "memory.load": "bytes",
    "speed.prefill": "tokens/s",
    "time.first_token": "seconds",
    "memory.generate": "bytes",
    "memory.unreset": "bytes",
}
"""Metrics of a point and their units, in the order in which they are measured."""


@dataclass(frozen=True)
class Subject:
    """A model in one precision."""

    given: str | None  # what the user typed; None: the bundled model
    weights: Weights  # stored, or random in a catalogue model's shape
    seed: int  # of random weights
    rounded: int | None  # bits to round to on the fly; None: the weights as they are
    dtype: str  # to compute in, a name of ``runtime.engine.DTYPES`` or ``auto``
    model: Model  # as rows name it


@dataclass(frozen=True)
class Point:
    """One measurement."""

    subject: Subject
    attention: str
    engine: str
    context: int  # tokens of the prompt
    tokens: int  # new tokens; 1: the point measures encoding the prompt
    device: str
    kernel: str = "auto"  # of quantised weights; ``auto`` is the fastest that supports them
    tp: int = 1  # processes that hold the model together, see ``runtime.tensor_parallel``

    @property
    def encodes(self) -> bool:
        """Tell whether it measures the prompt and not what follows."""
        return self.tokens == 1

    @property
    def metrics(self) -> dict[str, str]:
        """Return its metrics and their units."""
        return ENCODING if self.encodes else GENERATING

    @property
    def place(self) -> dict[str, Value]:
        """Return ``Row.point``; kernel and processes are part of it only where they were asked for."""
        found: dict[str, Value] = {
            "attention": self.attention,
            "engine": self.engine,
            "context": self.context,
            "tokens": self.tokens,
            "batch": 1,
            "device": self.device,
        }
        asked = {} if self.kernel == "auto" else {"kernel": self.kernel}
        return {**found, **asked, **({} if self.tp == 1 else {"tp": self.tp})}

    @property
    def label(self) -> str:
        """Return a description in one line."""
        what = f"encode {self.context}" if self.encodes else f"generate {self.tokens}"
        if not self.encodes and self.context > 1:
            what += f" after {self.context}"
        model = self.subject.model
        spread = "" if self.tp == 1 else f" on {self.tp} processes"
        return f"{model.label}, {self.attention}, {self.engine}{spread}, {what}"

    def row(self, metric: str, value: float | None, **more: Any) -> Row:
        """Return a row of this point."""
        return Row(metric, self.subject.model, self.place, value, self.metrics[metric], **more)

    def without(
        self, status: Status, reason: str, metrics: Iterable[str] | None = None, *, again: bool = False
    ) -> list[Row]:
        """Return rows with the reason for no figures; ``again``: the same command tries them again."""
        details = {"again": True} if again else {}
        return [
            self.row(metric, None, status=status, reason=reason, details=details)
            for metric in (self.metrics if metrics is None else metrics)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the child process."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Point:
        """Read what ``to_json`` returned."""
        subject = dict(content["subject"])
        subject["model"] = Model(**subject["model"])
        return cls(**{**content, "subject": Subject(**subject)})


def sweep(
    subjects: Sequence[Subject],
    *,
    attentions: Sequence[str],
    engines: Sequence[str],
    lengths: Sequence[tuple[int, int]],
    device: str,
    kernel: str = "auto",
    tp: int = 1,
) -> list[Point]:
    """Return every combination, the short lengths of all subjects before the long ones.

    Args:
        attentions: backends, or ``auto``: the default of ``runtime.engine.load`` for an engine.
        lengths: (context, new tokens).
    """
    import torch

    from qwenq.runtime.engine import find_attention

    where = torch.device(device)
    ordered = sorted(lengths, key=lambda pair: (pair[1], pair[0]))
    points = (
        Point(subject, find_attention(name, engine, where), engine, context, tokens, device, kernel, tp)
        for (context, tokens), subject, name, engine in product(ordered, subjects, attentions, engines)
    )
    return list(dict.fromkeys(points))  # a backend that is named may be what auto means


def is_done(point: Point, rows: Iterable[Row]) -> bool:
    """Tell whether a run folder has every row of a point, and none is to be tried again."""
    return has_rows(rows, point.place, point.subject.model, point.metrics)


def has_rows(rows: Iterable[Row], place: dict[str, Value], model: Model, metrics: Iterable[str]) -> bool:
    """Tell whether there is a row of every metric, and none is to be tried again."""
    mine = {row.metric: row for row in rows if (row.point, row.model) == (place, model)}
    return all(metric in mine and not mine[metric].details.get("again") for metric in metrics)


def lengths_of(context: Sequence[int], tokens: Sequence[int], encode: Sequence[int]) -> list[tuple[int, int]]:
    """Return (prompt, new tokens) of every point: prompts to encode have one new token.

    Args:
        context: prompts of generations.
        tokens: new tokens after each of them; empty, or 0 alone: no generation.
        encode: prompts whose encoding is measured; empty, or 0 alone: none.
    """
    news, encoded = ([] if list(found) == [0] else list(found) for found in (tokens, encode))
    for found, least, option, what in (
        (context, 1, "--context", "a generation has a prompt of 1 token or more"),
        (news, 2, "--tokens", "a generation has 2 new tokens or more"),
        (encoded, 1, "--encode", "a prompt to encode has 1 token or more"),
    ):
        if any(number < least for number in found):
            hint = "use 0 alone to skip these" if found is not context else None
            raise UsageError(what, where=option, hint=hint)
        if any(number > MOST_TOKENS for number in found):
            raise UsageError(f"no cache holds more than {MOST_TOKENS:,} tokens", where=option)
    if not news and not encoded:
        raise UsageError("there is nothing to measure", where="--tokens 0 --encode 0")
    return [*((length, 1) for length in encoded), *((c, t) for t in news for c in context)]


def require_kernel(kernel: str) -> None:
    """Refuse a misspelt name before the first point."""
    from qwenq.runtime.quantised_linear import KERNELS

    known = ("auto", *(each.name for each in KERNELS))
    if kernel not in known:
        raise UsageError(f"there is no {kernel!r}", where="--kernel", hint=f"use {', '.join(known)}")


def refuse_unsplittable(subjects: Sequence[Subject], engines: Sequence[str]) -> None:
    """Refuse what several processes cannot share, before anything is measured."""
    if wrong := [engine for engine in engines if engine != "transformers"]:
        raise UsageError(
            f"the engine {wrong[0]} runs on one device",
            where="--engine",
            hint="with --tp, use --engine transformers",
        )
    for subject in subjects:
        if subject.model.precision in BITS:
            raise UsageError(
                f"{subject.model.name} in {subject.model.precision}: packed weights cannot be split between "
                "processes",
                where="--tp",
                hint="name unquantised models, and precisions among fp32, bf16 and fp16",
            )


@dataclass
class Subjects:
    """The models of a sweep."""

    subjects: list[Subject] = field(default_factory=list)
    shapes: dict[str, ModelShape] = field(default_factory=dict)  # by model name
    notices: list[str] = field(default_factory=list)  # for the user, one line each
    plain: dict[str, str] = field(default_factory=dict)  # names of unquantised models by fingerprint
    # fingerprints that manifests of quantised models name, by model name
    bases: dict[str, str] = field(default_factory=dict)


def subjects_of(
    models: Sequence[str | None], precisions: Sequence[str], weights: Weights = "stored", seed: int = 0
) -> Subjects:
    """Open the models and list the precisions to measure of each."""
    if wrong := [name for name in precisions if name not in PRECISIONS]:
        hint = f"use {', '.join(PRECISIONS)}"
        raise UsageError(f"there is no precision {wrong[0]!r}", where="--precision", hint=hint)
    found = Subjects()
    for given in models:
        _add(found, given, precisions, weights, seed)
    # A quantised model is in the family of the base that its manifest names by fingerprint, as evaluations
    # have it: the base's folder may have been renamed since.
    families = {name: found.plain[base] for name, base in found.bases.items() if base in found.plain}
    found.subjects = [
        replace(each, model=replace(each.model, family=families.get(each.model.name, each.model.family)))
        for each in found.subjects
    ]
    return found


def _add(found: Subjects, given: str | None, precisions: Sequence[str], weights: Weights, seed: int) -> None:
    import torch

    from qwenq.models.identity import base_of, result_model
    from qwenq.models.opening import open_model

    checkpoint = open_model(given, weights, seed)
    if checkpoint.foreign is not None:
        raise UsageError(
            f"{checkpoint.foreign.format.name} has no kernel here: its weights are dequantised at load, so "
            "its speed and memory would be those of the unquantised model",
            where=given,
            hint="profile its base; or serve it and use --endpoint",
        )
    found.notices += checkpoint.notices
    shape = ModelShape.from_config(checkpoint.config)
    quantised = is_quantised(checkpoint.config)
    if quantised:  # in its own precision, whatever others were asked for
        model = result_model(checkpoint, torch.float32, given)
        made = [Subject(given, weights, seed, None, "auto", model)]
    else:
        made = [_plain(checkpoint, shape, given, weights, seed, precision) for precision in precisions]
    name = made[0].model.name
    if name in found.shapes:
        raise UsageError(f"two models are called {name}", where=given, hint="rename one of the folders")
    found.shapes[name] = shape
    found.subjects += made
    if not checkpoint.on_disk:  # to know random weights by their bytes, all would have to be drawn
        return
    if not quantised:
        found.plain[checkpoint.fingerprint] = made[0].model.family
    elif isinstance(base := base_of(checkpoint.folder).get("fingerprint"), str):
        found.bases[name] = base


def _plain(
    checkpoint: Checkpoint, shape: ModelShape, given: str | None, weights: Weights, seed: int, precision: str
) -> Subject:
    import torch

    from qwenq.models.bundled import is_bundled
    from qwenq.models.catalogue import BUNDLED
    from qwenq.models.identity import result_model
    from qwenq.models.rounded import group_size_for

    name = BUNDLED if weights == "random" and is_bundled(given) else given
    if precision not in BITS:
        model = result_model(checkpoint, getattr(torch, PRECISIONS[precision]), name)
        return Subject(given, weights, seed, None, PRECISIONS[precision], model)
    bits, group_size = BITS[precision], group_size_for(shape)
    base = result_model(checkpoint, torch.bfloat16, name)
    fingerprint = f"rounded-{bits}-{group_size}:{base.fingerprint}"
    nbytes = shape.quantised_bytes(bits, group_size)
    model = Model(base.name, fingerprint, precision, base.family, nbytes, group_size)
    return Subject(given, weights, seed, bits, "auto", model)
