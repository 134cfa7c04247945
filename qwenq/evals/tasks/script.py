"""Compose a benchmark under one protocol from functions; protocols differ in the functions they name."""

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


def missing_subjects(name: str, subjects: Collection[str], items: Sequence[Item]) -> list[str]:
    """Return a notice where the items cover only some of the benchmark's subjects."""
    covered = {item.subject for item in items} & set(subjects)
    if not covered or len(covered) == len(subjects):
        return []
    return [
        f"{len(covered)} of the {len(subjects)} subjects of {name}: "
        "not comparable with a score over all of them"
    ]


@dataclass(frozen=True)
class Script:
    """A benchmark under one protocol: copy ``tasks/gsm8k.py`` for a new one.

    Attributes:
        name: ``mmlu``, ``gsm8k`` …
        protocol: whose prompts, extraction and averages it uses.
        version: raised whenever prompts, extraction or averages change: older records are not used then.
        shots: default number of examples.
        allowed_shots: numbers of examples that the protocol has a prompt for.
        load: items of a source, of these subjects (none: all), each with this many examples.
        ask: the request for an item.
        read: the judgement on an answer; it runs no code.
        average: scores, the main one first.
        comment: notices on a set of items.
        program: the sandbox's program for an item and the extracted code; None: nothing has to be run.
        reference: the benchmark's own solution of an item, where there are programs.
        spare: references that may fail before the data or the sandbox counts as broken.
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
    comment: Callable[[Sequence[Item]], list[str]] = lambda items: []
    program: MakeProgram | None = None
    reference: Callable[[Item], str] | None = None
    spare: int = 0

    @property
    def needs_sandbox(self) -> bool:
        """Return whether the answers are code that has to be run."""
        return self.program is not None

    def items(self, source: DataSource, subjects: Sequence[str] = (), shots: int | None = None) -> list[Item]:
        """Return all items, validated.

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
        """Return the request for an item."""
        return self.ask(item)

    def judge(self, item: Item, answer: Answer) -> Judgement:
        """Return the judgement on an answer."""
        return self.read(item, answer)

    def scores(self, judged: Judged) -> list[Score]:
        """Return the scores, the main one first; none without items."""
        return self.average(judged) if judged else []

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Return notices on these items."""
        return self.comment(items)


def _spoken(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return " or ".join(map(str, numbers))
