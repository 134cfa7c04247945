"""Read run folders into one collection of rows, know their machines, and select rows of one point."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.environment import decisive, difference, measured_on
from qwenq.errors import UsageError
from qwenq.reporting.text import LONGEST_COMMAND, clean, count
from qwenq.results import HERE, RESULTS_FILE, Model, Row, Value, each_run, read_environment

PRECISIONS = {
    "fp32": "FP32",
    "bf16": "BF16",
    "fp16": "FP16",
    "fp8": "FP8",
    "ct-fp8": "FP8 (compressed-tensors)",
    "int8": "Int8",
    "ct-int8": "Int8 (compressed-tensors)",
    "int4": "Int4",
    "awq-int4": "Int4 (AWQ)",
    "ct-int4": "Int4 (compressed-tensors)",
    "int3": "Int3",
    "int2": "Int2",
}
"""Names of precisions as the cards write them, in the cards' order; after each, those of other tools."""


@dataclass(frozen=True)
class Run:
    """A run folder."""

    name: str  # the folder's own name; never its path, which may name a machine or its owner
    environment: dict[str, Any]  # what it was measured on (``qwenq.environment``)
    # instructions of all its figures of a CPU; empty where they differ. A point that was never begun names
    # none, and stands in the line of the others
    kernels: str = ""


@dataclass(frozen=True)
class Measured:
    """A row and the run that it comes from."""

    row: Row
    run: Run

    @property
    def place(self) -> tuple[object, ...]:
        """Return what figures of different metrics share if they are of one measurement."""
        point = sorted((key, str(value)) for key, value in self.row.point.items())
        return (self.row.model, self.run.name, *point)

    @property
    def hardware(self) -> str:
        """Return what computed it, by the row itself, else by its folder."""
        row = self.row  # of an accuracy the device is no part of the point: it decides nothing
        device = row.point.get("device", row.settings.get("device"))
        found = measured_on(self.run.environment, row.settings)
        shown = hardware(found, device)
        if row.point.get("device") != "cpu":
            return shown
        never_begun = row.value is None and not row.implementation
        return f"{shown}{(never_begun and self.run.kernels) or _kernels(found, row)}"


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
        kind = model.family, model.precision
        models = {item.row.model for item in self.measured}
        siblings = [other for other in models if (other.family, other.precision) == kind]
        base = PRECISIONS.get(model.precision, clean(model.precision))
        distinct = len({other.fingerprint for other in siblings})
        if distinct < 2:
            return base
        if len({other.group_size for other in siblings}) == distinct:
            return f"{base}, groups of {model.group_size}" if model.group_size else base
        if len({other.name for other in siblings}) == distinct:
            return f"{base}, {clean(model.name)}"
        return f"{base}, {clean(model.fingerprint.rsplit(':', 1)[-1][:8])}"


def collect(folders: list[Path]) -> Collection:
    """Read run folders, each named once, which together have a row at least."""
    if not folders:
        raise UsageError("no run folder is named", where="RUNS", hint="name folders of qwenq eval or profile")
    places = [folder.resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UsageError("this run is named twice", where=twice[-1], hint="name each run folder once")
    runs: list[Run] = []
    measured: list[Measured] = []
    for folder, rows, environment in each_run(folders):
        _refuse_depths([environment, *([row.settings, row.details] for row in rows)], folder)
        run = _run(_name(folder, [other.name for other in runs]), environment, rows)
        runs.append(run)
        measured += [Measured(row, run) for row in rows]
    if not measured:
        where = ", ".join(str(folder) for folder in folders)
        hint = "measure something into it with qwenq eval or profile"
        raise UsageError("there is no row in these runs", where=where, hint=hint)
    return Collection(tuple(runs), tuple(measured))


def rows_of_run(folder: Path, rows: Sequence[Row]) -> Collection:
    """Return some rows of a run folder as a collection."""
    run = _run(_name(folder, []), read_environment(folder), rows)
    return Collection((run,), tuple(Measured(row, run) for row in rows))


def _run(name: str, environment: dict[str, Any], rows: Sequence[Row]) -> Run:
    named = {
        _kernels(measured_on(environment, row.settings), row)
        for row in rows
        if row.value is not None and row.point.get("device") == "cpu"
    }
    return Run(name, environment, named.pop() if len(named) == 1 else "")


DEEPEST = 100
"""Levels of nested lists; our rows have five, and Python's own limit is not far above."""


def _refuse_depths(values: list[Any], folder: Path) -> None:
    """Refuse values that can be read, but are nested too deeply to be copied or written again."""
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
    """Return the place of a precision, or of its name, in the cards' order; unknown ones are last."""
    for known in (list(PRECISIONS), list(PRECISIONS.values())):
        if precision in known:
            return known.index(precision)
    return len(PRECISIONS)


UNKNOWN = "unknown hardware"


def hardware(environment: dict[str, Any], device: object = None) -> str:
    """Return one line on the hardware: the GPUs, or the processor with its cores.

    The row's device is ``cpu`` or ``cuda``, of a server ``unknown``; None: a GPU if there is one.
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


_VARIANTS = {
    "avx512-bf16": "AVX-512 BF16",
    "avx512-vnni": "AVX-512 VNNI",
    "avx-vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "neon": "NEON",
}
_WIDEST = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}


def _kernels(environment: dict[str, Any], row: Row) -> str:
    """Return the instructions of a CPU's figure: the variant that the row names, else the CPU's widest."""
    if named := re.search(r"\bC for ([\w-]+)", row.implementation):
        return f", {_VARIANTS.get(named[1], clean(named[1]))}"
    cpu = environment.get("cpu")
    features = cpu.get("features") if isinstance(cpu, dict) else None
    has = features if isinstance(features, list) else []
    return next((f", {name}" for flag, name in _WIDEST.items() if flag in has), "")


# Decide whether two figures come from the same kind of machine.
#
# Two machines may share the label ``AMD EPYC, 2 cores`` though one multiplies twice as fast. So the facts
# of ``qwenq.environment`` that decide speed and memory are compared one by one; one that a side lacks
# differs.


NOT_RECORDED, OTHER_MACHINE = "a run does not record its hardware", "another machine"


def machine_of(item: Measured) -> dict[str, str]:
    """Return the facts that decide a row's speed and memory; an unrecorded one is ``unknown``.

    A row records its machine and threads; its folder, those of the last command.
    """
    row = item.row
    found = measured_on(item.run.environment, row.settings)
    facts = decisive(found, row.point.get("device"), row.settings.get("threads"))
    return {key: clean(value, LONGEST_COMMAND) for key, value in facts.items()}


def machine_difference(old: Measured, new: Measured) -> str:
    """Return how two machines differ, as in ``another machine: threads 2 instead of 4``; empty if alike."""
    if old.row.model.served and new.row.model.served:
        return _server_difference(old, new)
    if UNKNOWN in (old.hardware, new.hardware):
        return NOT_RECORDED
    shown = difference(machine_of(old), machine_of(new))
    return f"{OTHER_MACHINE}: {shown}" if shown else ""


def _server_difference(old: Measured, new: Measured) -> str:
    """Return how two servers of models differ: in kind, in place or, on this machine, in its facts."""
    before, after = (item.row.settings.get("server") for item in (old, new))
    if not isinstance(before, dict) or not isinstance(after, dict):
        return "a run does not record its server"
    kinds = [clean(server.get("kind") or "unknown") for server in (before, after)]
    if kinds[0] != kinds[1] or "unknown" in kinds:
        return f"another server: {kinds[1]} instead of {kinds[0]}"
    if before.get("place") != after.get("place"):
        return "a server on another machine"
    here = before.get("place") == HERE
    shown = difference(machine_of(old), machine_of(new)) if here else ""
    return f"{OTHER_MACHINE}: {shown}" if shown else ""


def hardware_names(measured: Iterable[Measured]) -> Callable[[Measured], str]:
    """Return a function that names a row's hardware, with what differs if several machines share a label.

    Only rows whose point has a ``device`` distinguish machines: an accuracy is the same with any threads.
    """
    facts_of: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in measured:
        if item.row.status == "ok" and "device" in item.row.point:
            for key, value in machine_of(item).items():
                facts_of[item.hardware][key].add(value)
    differing = {
        label: {key for key, values in facts.items() if len(values) > 1} for label, facts in facts_of.items()
    }

    def name(item: Measured) -> str:
        label = item.hardware
        keys = differing.get(label, set()) if "device" in item.row.point else set()
        shown = ", ".join(f"{key} {value}" for key, value in machine_of(item).items() if key in keys)
        return f"{label} ({shown})" if shown else label

    return name


def choose_baseline(baseline: Path, new: Path) -> tuple[Path, str]:
    """Choose among baselines, one for each kind of machine, that of a new run's; return why, where it did.

    A run folder is taken as it is; of a folder of run folders, where none is of that machine, the first by
    name: what depends on no machine is compared all the same.
    """
    folders = sorted(file.parent for file in baseline.glob(f"*/{RESULTS_FILE}"))
    if (baseline / RESULTS_FILE).exists() or not folders:
        return baseline, ""
    machines = _machines(new)
    for folder in folders:
        if machines & _machines(folder):
            return folder, "of the same machine"
    return folders[0], "no baseline is of this machine"


def _machines(run: Path) -> set[tuple[str, ...]]:
    """Return the machines that decided a run's speed and memory; where it has neither, those of all rows."""
    measured = collect([run]).measured
    decided = [item for item in measured if "device" in item.row.point or item.row.model.served]
    return {tuple(machine_of(item).values()) for item in decided or measured}


# Select the rows of one point, which may stand beside each other in a plot.


def at_one_point(
    rows: list[Measured], *, anywhere: bool = False, fastest_of: tuple[str, ...] = ()
) -> list[Measured]:
    """Return the measured rows of the point that most models have; each model once.

    Of points with equally many models, the one with most tokens counts, then the one with the largest sum.

    Args:
        rows: of one metric.
        anywhere: on any machine: accuracy and divergence do not depend on it.
        fastest_of: keys of the point that may differ; of a model's rows the largest counts.
    """
    groups: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for item in rows:
        if item.row.status == "ok":
            point = (
                f"{key}={value}" for key, value in sorted(item.row.point.items()) if key not in fastest_of
            )
            where = () if anywhere else (item.hardware, *machine_of(item).values())
            groups[*where, *point].append(item)
    if not groups:
        return []
    best = max(groups.values(), key=_worth)
    if fastest_of:
        best.sort(key=lambda item: item.row.value or 0.0)  # stable: the last of each model is its fastest
    chosen = {item.row.model: item for item in best}
    return [chosen[model] for model in dict.fromkeys(item.row.model for item in rows) if model in chosen]


def _worth(group: list[Measured]) -> tuple[int, int, float]:
    tokens = group[0].row.point.get("tokens")
    models = len({item.row.model for item in group})
    return models, tokens if isinstance(tokens, int) else 0, sum(item.row.value or 0 for item in group)


ATTENTION = {
    **dict.fromkeys(("v2", "flash2"), "flash v2"),
    **dict.fromkeys(("v1", "flash1"), "flash v1"),
    **dict.fromkeys(("off", "plain"), "plain"),
}
"""Names of attention backends in tables, ours and the cards'; others keep their own."""


def attention(value: Value) -> str:
    """Return a backend's name in the tables' words."""
    return ATTENTION.get(str(value), clean(value))


def point_text(rows: list[Measured], *, without: tuple[str, ...] = ()) -> str:
    """Describe the point and hardware of rows for a caption, by the first; empty without any."""
    if not rows:
        return ""
    item = rows[0]
    point = {key: value for key, value in item.row.point.items() if value is not None}
    context, tokens = point.pop("context", None), point.pop("tokens", None)
    parts = [f"{tokens} new tokens"] if tokens != 1 and tokens is not None else []
    parts += [f"a prompt of {context}"] if context not in (None, 1) else []
    if "attention" in point:
        point["attention"] = attention(point["attention"])
    point.pop("device", None)  # the hardware says it
    parts += [f"{key} {value}" for key, value in point.items() if key not in without]
    return clean(", ".join([*parts, item.hardware]))


def decode_rows(collection: Collection, family: str) -> list[Measured]:
    """Return each model's speed of decoding at one length, with its fastest attention and engine.

    By the cards' protocol if decoding alone was not measured.
    """
    for metric in ("speed.decode", "speed.protocol"):
        if chosen := at_one_point(collection.of(family, metric), fastest_of=FASTEST_OF):
            return chosen
    return []


FASTEST_OF = ("attention", "engine")
"""Choices that change only how fast a model answers: each model is shown with its best."""
