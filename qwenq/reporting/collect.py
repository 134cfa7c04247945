"""Read run folders into one collection of rows, each with its run, hardware and a label for its model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.environment import measured_on
from qwenq.errors import UsageError
from qwenq.reporting.text import clean, count
from qwenq.results import Model, Row, each_run

PRECISIONS = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "Int8", "int4": "Int4"}
"""Names of precisions as the cards write them, in the cards' order."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        name: the folder's own name; never its path, which may name a machine or its owner.
        environment: what it was measured on (``qwenq.environment``).
    """

    name: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A row and the run that it comes from."""

    row: Row
    run: Run

    @property
    def hardware(self) -> str:
        """Return what computed it, by the row itself, else by its folder."""
        row = self.row  # of an accuracy the device is no part of the point: it decides nothing
        device = row.point.get("device", row.settings.get("device"))
        return hardware(measured_on(self.run.environment, row.settings), device)


@dataclass(frozen=True)
class Collection:
    """What a report is made of."""

    runs: tuple[Run, ...]
    measured: tuple[Measured, ...]

    @property
    def families(self) -> list[str]:
        """Return the unquantised models in order of appearance."""
        return list(dict.fromkeys(item.row.model.family for item in self.measured))

    def of(self, family: str, *metrics: str) -> list[Measured]:
        """Return rows of a family, of the given metrics if any, precisions in the cards' order."""
        found = [
            item
            for item in self.measured
            if item.row.model.family == family and (not metrics or item.row.metric in metrics)
        ]
        return sorted(found, key=lambda item: rank(item.row.model.precision))

    def label(self, model: Model) -> str:
        """Return ``Int4``, with group size or name if the family has several models of that precision."""
        siblings = {
            item.row.model
            for item in self.measured
            if (item.row.model.family, item.row.model.precision) == (model.family, model.precision)
        }
        base = PRECISIONS.get(model.precision, clean(model.precision))
        if len({other.fingerprint for other in siblings}) < 2:
            return base
        if len({other.group_size for other in siblings}) == len({other.fingerprint for other in siblings}):
            return f"{base}, groups of {model.group_size}" if model.group_size else base
        if len({other.name for other in siblings}) == len({other.fingerprint for other in siblings}):
            return f"{base}, {clean(model.name)}"
        return f"{base}, {clean(model.fingerprint.rsplit(':', 1)[-1][:8])}"


def collect(folders: list[Path]) -> Collection:
    """Read run folders.

    Raises:
        UsageError: no folder is named, or one twice, one has no results, or together they have no row.
    """
    if not folders:
        raise UsageError("no run folder is named", where="RUNS", hint="name folders of qwenq eval or profile")
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UsageError("this run is named twice", where=twice[-1], hint="name each run folder once")
    runs: list[Run] = []
    measured: list[Measured] = []
    for folder, rows, environment in each_run(folders):
        _refuse_depths([environment, *([row.settings, row.details] for row in rows)], folder)
        run = Run(_name(folder, [other.name for other in runs]), environment)
        runs.append(run)
        measured += [Measured(row, run) for row in rows]
    if not measured:
        where = ", ".join(str(folder) for folder in folders)
        hint = "measure something into it with qwenq eval or profile"
        raise UsageError("there is no row in these runs", where=where, hint=hint)
    return Collection(tuple(runs), tuple(measured))


DEEPEST = 100
"""Levels of nested lists; our rows have five, and Python's own limit is not far above."""


def _refuse_depths(values: list[Any], folder: Path) -> None:
    """Refuse values that can be read, but neither copied nor written again.

    Raises:
        UsageError: a value is nested too deeply.
    """
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in values)
        values = [value for each in inner for value in each if isinstance(value, dict | list)]
        if not values:
            return
    raise UsageError(
        f"rows or environment have more than {DEEPEST} levels of lists",
        where=folder,
        hint="this is not a run folder of qwenq",
    )


def _name(folder: Path, taken: list[str]) -> str:
    """Return the folder's name, numbered if another run has it."""
    name = clean(folder.resolve().name) or "run"
    numbered = (name, *(f"{name} ({number})" for number in range(2, len(taken) + 2)))
    return next(each for each in numbered if each not in taken)


def rank(precision: str) -> int:
    """Return the place of a precision in the cards' order; unknown ones are last."""
    known = list(PRECISIONS)
    return known.index(precision) if precision in known else len(known)


UNKNOWN = "unknown hardware"


def hardware(environment: dict[str, Any], device: object = None) -> str:
    """Return one line on the hardware: the GPUs, or the processor with its cores.

    Args:
        environment: of the run.
        device: of the row, ``cpu`` or ``cuda``; ``unknown`` for a server; None: a GPU if there is one.
    """
    if device == "unknown":
        return UNKNOWN
    gpus = environment.get("gpus") if device is None or not str(device).startswith("cpu") else None
    names = [str(gpu.get("name")) for gpu in gpus if isinstance(gpu, dict)] if isinstance(gpus, list) else []
    if names:
        counted = (f"{number} × {name}" if number > 1 else name for name, number in Counter(names).items())
        return clean(" + ".join(counted))
    cpu = environment.get("cpu")
    if isinstance(cpu, str):
        return clean(cpu)
    if not isinstance(cpu, dict) or not cpu.get("model"):
        return UNKNOWN
    cores, threads = cpu.get("cores"), cpu.get("threads")
    parts = [str(cpu["model"]), *([count(cores, "cores")] if cores else [])]
    return clean(", ".join([*parts, count(threads, "threads")] if threads and threads != cores else parts))
