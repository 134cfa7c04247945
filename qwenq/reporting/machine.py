"""Whether two figures come from machines of one kind: of whatever decides a speed or a peak of memory.

Two machines may share the label ``AMD EPYC, 2 cores``, and one multiply twice as fast. So the facts of
``qwenq.environment`` are compared one by one. What only one side says counts as another: doubt is no pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwenq.reporting.collect import Measured
from qwenq.reporting.text import clean

UNKNOWN = "unknown"
NOT_SAID = "a run does not say its hardware"


def machine_of(item: Measured) -> dict[str, str]:
    """What decides a row's speed and memory, as text; a fact that nobody recorded is ``unknown``."""
    return dict(_facts(item))


def another_machine(old: Measured, new: Measured) -> str:
    """What is another machine's, in words; empty where all facts are the same.

    Returns:
        ``another machine: instruction sets avx2 instead of avx2 avx512f``, or that a run says no hardware.
    """
    if "unknown hardware" in (old.hardware, new.hardware):
        return NOT_SAID
    before, after = machine_of(old), machine_of(new)
    differing = (key for key in {**before, **after} if before.get(key) != after.get(key))
    told = (f"{key} {after.get(key, UNKNOWN)} instead of {before.get(key, UNKNOWN)}" for key in differing)
    shown = ", ".join(told)
    return f"another machine: {shown}" if shown else ""


def _facts(item: Measured) -> Iterator[tuple[str, str]]:
    environment = item.run.environment
    cpu = environment.get("cpu")
    facts = cpu if isinstance(cpu, dict) else {"model": cpu}
    yield "processor", _text(facts.get("model"))
    yield "cores", _text(facts.get("cores"))
    # A row knows with how many threads it was computed; its folder, with how many the last command was.
    yield "threads", _text(item.row.settings.get("threads", facts.get("threads")))
    found = facts.get("features")
    yield "instruction sets", " ".join(sorted(map(clean, found))) if isinstance(found, list) else UNKNOWN
    gpus = environment.get("gpus")
    if str(item.row.point.get("device")).startswith("cpu"):
        return  # whether one is there decides nothing then
    yield "GPUs", "; ".join(map(_gpu, gpus)) or "none" if isinstance(gpus, list) else UNKNOWN


def _gpu(gpu: Any) -> str:
    if not isinstance(gpu, dict):
        return _text(gpu)
    size = gpu.get("memory_bytes")
    return clean(f"{gpu.get('name')}{f' of {size} bytes' if size else ''}")


def _text(value: Any) -> str:
    return UNKNOWN if value is None else clean(value)
