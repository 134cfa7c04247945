"""A benchmark under one protocol, put together from functions: where its items come from, what to ask, how to
read the answer, how to average. The protocols of a benchmark differ in the functions they name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from qwenq.errors import UsageError
from qwenq.evals.task import (
    Answer,
    DataSource,
    Item,
    Judgement,
    MakeProgram,
    ProtocolName,
    Request,
    Score,
)

Judged = Sequence[tuple[Item, Judgement]]


def no_notes(items: Sequence[Item]) -> list[str]:
    """Nothing to say."""
    return []


def missing_subjects(name: str, subjects: Collection[str], items: Sequence[Item]) -> list[str]:
    """A sentence when the items cover some of the benchmark's subjects only."""
    covered = {item.subject for item in items} & set(subjects)
    if not covered or len(covered) == len(subjects):
        return []
    return [
        f"{len(covered)} of the {len(subjects)} subjects of {name}: "
        "not comparable with a score over all of them"
    ]


@dataclass(frozen=True)
class Script:
    """A benchmark under one protocol (implements ``evals.task.Task``).

    Attributes:
        shots: the protocol's own number of examples.
        allowed_shots: which other numbers it can be asked for.
        load: the items of a source, of these subjects (none: all), each with this many examples.
        ask: what to ask about an item.
        read: what an answer is worth.
        average: scores, the main one first.
        comment: what has to be said of a set of items.
        program: what a sandbox runs for an item and what ``read`` extracted; None: nothing has to be run.
        reference: where there are programs: the benchmark's own solution of an item, as ``read`` extracts it.
        spare: how many of those may fail before the data or the sandbox counts as broken.
    """

    name: str
    protocol: ProtocolName
    version: int
    shots: int
    allowed_shots: Sequence[int]
    load: Callable[[DataSource, Sequence[str], int], list[Item]]
    ask: Callable[[Item], Request]
    read: Callable[[Item, Any], Judgement]
    average: Callable[[Judged], list[Score]]
    comment: Callable[[Sequence[Item]], list[str]] = no_notes
    program: MakeProgram | None = None
    reference: Callable[[Item], str] | None = None
    spare: int = 0

    @property
    def needs_sandbox(self) -> bool:
        """Whether the answers are code that has to be run."""
        return self.program is not None

    def items(self, source: DataSource, subjects: Sequence[str] = (), shots: int | None = None) -> list[Item]:
        """All items, validated.

        Raises:
            DataError: no data, broken data, or a subject that does not exist.
            UsageError: a number of examples that this protocol has no prompt for.
        """
        wanted = self.shots if shots is None else shots
        if wanted not in self.allowed_shots:
            raise UsageError(
                f"{self.name} under the {self.protocol} protocol cannot show {wanted} examples",
                where="--shots",
                hint=f"it takes {_spoken(self.allowed_shots)}; leave the option out for {self.shots}",
            )
        return self.load(source, tuple(subjects), wanted)

    def request(self, item: Item) -> Request:
        """What to ask."""
        return self.ask(item)

    def judge(self, item: Item, answer: Answer) -> Judgement:
        """What the answer was worth."""
        return self.read(item, answer)

    def scores(self, judged: Judged) -> list[Score]:
        """The main score first; none for no items."""
        return self.average(judged) if judged else []

    def notes(self, items: Sequence[Item]) -> list[str]:
        """What has to be said of these items beside their score."""
        return self.comment(items)


def _spoken(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return " or ".join(map(str, numbers))
