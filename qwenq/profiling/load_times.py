"""How long points take to load, learnt while a sweep goes on.

Each point has a process of its own, which reads torch, the model and, for one that is rounded on the fly,
makes its integers. On a short budget that is most of the time, and no estimate knows the machine: its disk,
what is in its cache, what else it does. So every load of the sweep is timed, and those to come are expected
to take as long.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import median

from qwenq.profiling.planning import Planned
from qwenq.profiling.points import Subject

_Kind = tuple[Subject, str, str, int]


class LoadTimes:
    """Loads that were timed: by what was loaded, and against the plan."""

    def __init__(self) -> None:
        self._seconds: defaultdict[_Kind, list[float]] = defaultdict(list)
        self._ratios: list[float] = []

    @property
    def known(self) -> bool:
        """Whether any load was timed."""
        return bool(self._ratios)

    def learn(self, planned: Planned, seconds: float) -> None:
        """A point took so long from its start to its first figure.

        Args:
            planned: as the plan had it, not corrected.
        """
        self._seconds[_kind(planned)].append(seconds)
        if planned.load > 0:
            self._ratios.append(seconds / planned.load)

    def corrected(self, planned: Planned) -> Planned:
        """With the median of the same model's loads; before its first, the plan's times the median ratio."""
        if seen := self._seconds.get(_kind(planned)):
            return replace(planned, load=median(seen))
        return replace(planned, load=planned.load * median(self._ratios)) if self._ratios else planned


def _kind(planned: Planned) -> _Kind:
    point = planned.point
    return point.subject, point.engine, point.kernel, point.tp
