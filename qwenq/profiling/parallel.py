"""A sweep on several processes that hold each model together: who measures, and who helps.

Every rank of torchrun runs the same command. The leader's has the plan, the run folder and the clock. For
each point it names a meeting, and each rank starts a child there: one process a point, as ever, so that the
memory of one point is not that of the next. When one of these ends, the others' parents know (``meeting``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwenq.distributed import Team
from qwenq.errors import UsageError
from qwenq.profiling.child import assist_in_child, measure_in_child
from qwenq.profiling.meeting import Meeting
from qwenq.profiling.points import BITS, Point, Subject
from qwenq.profiling.sweep import Measure
from qwenq.results import Row


def check_processes(team: Team, tp: int) -> None:
    """Whether as many processes were started as --tp says.

    Raises:
        UsageError: there are more, or fewer.
        SystemExit: the same, on a rank that does not talk.
    """
    if tp == team.world:
        return
    if not team.leads:
        raise SystemExit(UsageError.exit_code)
    started = "one process" if team.world == 1 else f"{team.world} processes"
    count = max(tp, team.world)
    raise UsageError(
        f"--tp {tp}, but torchrun started {started}" if team.launched else f"--tp {tp} without torchrun",
        where="--tp",
        hint=f"torchrun --nproc-per-node {count} -m qwenq profile … --tp {count}",
    )


def refuse_unsplittable(subjects: Sequence[Subject], engines: Sequence[str]) -> None:
    """Before anything is measured: what no model can be split with, see ``runtime.tensor_parallel``.

    Raises:
        UsageError: another engine than transformers; a model that is quantised, or would be rounded.
    """
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


def measure_together(team: Team) -> Measure:
    """The leader's way from a point to its rows: the others are told, then all children meet."""
    count = 0

    def measure(point: Point, seconds: float | None) -> Iterator[Row]:
        nonlocal count
        count += 1
        meeting = Meeting(f"point{count}/", team.rank)
        team.tell({"point": point.to_json(), "seconds": seconds, "meeting": meeting.name})
        try:
            yield from measure_in_child(point, seconds, meeting)
        finally:
            meeting.say("failed", "it measures this point no more")

    return measure


def help_measure(team: Team) -> None:
    """What the other ranks do until the leader says that the sweep is over.

    Raises:
        LostError: another process has stopped.
    """
    while (told := team.tell()) is not None:
        meeting = Meeting(told["meeting"], team.rank)
        assist_in_child(Point.from_json(told["point"]), told["seconds"], meeting)
