"""Whether two figures come from machines of one kind: of whatever decides a speed or a peak of memory.

Two machines may share the label ``AMD EPYC, 2 cores``, and one multiply twice as fast. So the facts of
``qwenq.environment`` are compared one by one. What only one side says counts as another: doubt is no pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from qwenq.environment import decisive, difference, measured_on
from qwenq.reporting.collect import UNKNOWN, Measured
from qwenq.reporting.text import LONGEST_COMMAND, clean

NOT_SAID = "a run does not say its hardware"


def machine_of(item: Measured) -> dict[str, str]:
    """What decides a row's speed and memory, as text; a fact that nobody recorded is ``unknown``.

    A row knows its machine, and with how many threads it was computed; its folder, those of the last command.
    """
    row = item.row
    found = measured_on(item.run.environment, row.settings)
    facts = decisive(found, row.point.get("device"), row.settings.get("threads"))
    return {key: clean(value, LONGEST_COMMAND) for key, value in facts.items()}


def another_machine(old: Measured, new: Measured) -> str:
    """What is another machine's, in words; empty where all facts are the same.

    Returns:
        ``another machine: instruction sets avx2 instead of avx2 avx512f``, or that a run says no hardware.
    """
    if UNKNOWN in (old.hardware, new.hardware):
        return NOT_SAID
    shown = difference(machine_of(old), machine_of(new))
    return f"another machine: {shown}" if shown else ""


def hardware_names(measured: Iterable[Measured]) -> Callable[[Measured], str]:
    """How to name a row's hardware: by its label, and by what differs where several machines share that.

    Only figures that a machine decides tell machines apart, those whose point has a ``device``: an accuracy
    is the same with one thread and with two.
    """
    said: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in measured:
        if item.row.status == "ok" and "device" in item.row.point:
            for key, value in machine_of(item).items():
                said[item.hardware][key].add(value)
    differing = {
        label: {key for key, values in facts.items() if len(values) > 1} for label, facts in said.items()
    }

    def name(item: Measured) -> str:
        label = item.hardware
        keys = differing.get(label, set()) if "device" in item.row.point else set()
        told = ", ".join(f"{key} {value}" for key, value in machine_of(item).items() if key in keys)
        return f"{label} ({told})" if told else label

    return name
