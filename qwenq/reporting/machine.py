"""Decide whether two figures come from the same kind of machine.

Two machines may share the label ``AMD EPYC, 2 cores`` though one multiplies twice as fast. So the facts of
``qwenq.environment`` that decide speed and memory are compared one by one; one that a side lacks differs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from qwenq.environment import decisive, difference, measured_on
from qwenq.reporting.collect import UNKNOWN, Measured
from qwenq.reporting.text import LONGEST_COMMAND, clean

NOT_SAID = "a run does not record its hardware"


def machine_of(item: Measured) -> dict[str, str]:
    """Return the facts that decide a row's speed and memory; an unrecorded one is ``unknown``.

    A row records its machine and threads; its folder, those of the last command.
    """
    row = item.row
    found = measured_on(item.run.environment, row.settings)
    facts = decisive(found, row.point.get("device"), row.settings.get("threads"))
    return {key: clean(value, LONGEST_COMMAND) for key, value in facts.items()}


def another_machine(old: Measured, new: Measured) -> str:
    """Return how two machines differ; empty if all facts are the same.

    Returns:
        Such as ``another machine: instruction sets avx2 instead of avx2 avx512f``.
    """
    if UNKNOWN in (old.hardware, new.hardware):
        return NOT_SAID
    shown = difference(machine_of(old), machine_of(new))
    return f"another machine: {shown}" if shown else ""


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
