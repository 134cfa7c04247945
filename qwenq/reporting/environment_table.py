"""List what runs were measured on; what all runs share is listed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwenq.environment import measured_on
from qwenq.reporting.collect import Collection, Run
from qwenq.reporting.text import clean, count
from qwenq.reporting.units import GIB


def environment_lines(collection: Collection) -> list[tuple[str, str]]:
    """Return pairs of fact and value; facts that differ between runs name the run.

    A run with rows of several machines has their values joined by ``and``.
    """
    facts = {run.name: _facts_of_run(run, collection) for run in collection.runs}
    lines = []
    for key in dict.fromkeys(key for found in facts.values() for key in found):
        values = {name: found.get(key, "unknown") for name, found in facts.items()}
        if len(set(values.values())) == 1:
            lines.append((key, next(iter(values.values()))))
        else:
            lines += [(f"{key} of {name}", value) for name, value in values.items()]
    return lines


def _facts_of_run(run: Run, collection: Collection) -> dict[str, str]:
    """Collect the facts of a run's machines from its rows; the folder only knows the last command's."""
    mine = [item.row for item in collection.measured if item.run is run]
    found: dict[str, dict[str, None]] = {}
    for environment in [measured_on(run.environment, row.settings) for row in mine] or [run.environment]:
        for key, value in _facts(environment):
            found.setdefault(key, {})[value] = None
    return {key: " and ".join(values) for key, values in found.items()}


def _facts(environment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cpu = environment.get("cpu")
    if isinstance(cpu, str):
        yield "processor", clean(cpu)
    elif isinstance(cpu, dict):
        counts = ", ".join(count(cpu[key], key) for key in ("cores", "threads") if cpu.get(key))
        yield "processor", clean(", ".join(part for part in (str(cpu.get("model")), counts) if part))
        if isinstance(cpu.get("features"), list) and cpu["features"]:
            yield "instruction sets", clean(" ".join(map(str, cpu["features"])))
    if size := _gib(environment.get("memory_bytes")):
        yield "memory", size
    gpus = environment.get("gpus")
    if isinstance(gpus, list):
        yield "GPUs", "; ".join(_gpu(gpu) for gpu in gpus if isinstance(gpu, dict)) or "none"
    for key, name in (("os", "system"), ("python", "Python")):
        if environment.get(key):
            yield name, clean(environment[key])
    versions = environment.get("versions")
    if isinstance(versions, dict):
        shown = (f"{name} {version}" for name, version in versions.items() if name != "python")
        yield "versions", clean(", ".join(shown))


def _gib(nbytes: Any) -> str:
    """Return a size in GiB; empty if it is not a number of bytes."""
    return f"{nbytes / GIB:.1f} GiB" if isinstance(nbytes, int) and 0 < nbytes < 2**63 else ""


def _gpu(gpu: dict[str, Any]) -> str:
    memory = _gib(gpu.get("memory_bytes"))
    size = f", {memory}" if memory else ""
    driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
    return clean(f"{gpu.get('name')}{size}{driver}")
