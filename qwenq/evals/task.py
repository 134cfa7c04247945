"""What a benchmark is: items from its data, a request for each, a judgement on the answer, a score of all.

A task knows no model, tokenizer or engine. It says what to ask (``Choose`` one of some continuations, or
``Write`` text) and reads what came back. Whoever runs it (``evals.run``) turns requests into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from qwenq.evals.sandbox.programs import Program

ProtocolName = Literal["card", "base", "lm-eval"]
Message = Mapping[str, str]
"""A turn of a chat: ``role`` and ``content``."""
Prompt = str | tuple[Message, ...]
"""Text as it is (no special token is parsed in it), or turns for the model's chat template."""

SYSTEM = "You are a helpful assistant."
"""Of Qwen's own chat scripts, said in so many words: a model's template may have another."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in the task: ``abstract_algebra/12``, ``HumanEval/3``.
        subject: what its score is averaged with first; None where the task has no subjects.
        data: the row as the data file has it.
        shots: rows shown before it, in order.
    """

    id: str
    subject: str | None
    data: Mapping[str, str]
    shots: tuple[Mapping[str, str], ...] = ()


def first_turn(text: str) -> tuple[Message, ...]:
    """A chat that begins with this question, as Qwen's scripts ask chat models."""
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": text})


@dataclass(frozen=True)
class Choose:
    """Which of these continuations is likeliest right behind the prompt? No text is generated."""

    prompt: Prompt
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Write:
    """Go on greedily; stop at an end-of-text id, before any of ``until``, or at the limit."""

    prompt: Prompt
    max_new_tokens: int
    until: tuple[str, ...] = ()


Request = Choose | Write


@dataclass(frozen=True)
class Chosen:
    """Answer to ``Choose``.

    Attributes:
        logprobs: float32 log softmax over the vocabulary, summed over each continuation's tokens.
        published: the published base scripts' score: softmax over the vocabulary, then over the choices, both
            in the model's own dtype. Near choices tie there, and the first of them wins.
    """

    logprobs: tuple[float, ...]
    published: tuple[float, ...]


@dataclass(frozen=True)
class Written:
    """Answer to ``Write``: the new text without what stopped it, and how many tokens it took."""

    text: str
    tokens: int
    stopped: bool


def chat_text(answer: Written) -> str:
    """The text as Qwen's chat scripts get it from the model: without white space around it.

    Of an answer that is cut at the limit their ``model.chat`` loses the last token, too; here it stays.
    """
    return answer.text.strip()


Answer = Chosen | Written


@dataclass(frozen=True)
class Judgement:
    """What an answer was worth.

    Attributes:
        correct: the task's main metric.
        extracted: what was read out of the answer, for people; None: nothing was found.
        also: further verdicts by metric name, such as ``published`` or ``flexible``.
        note: why, where that is worth saying (the sandbox's verdict on a program).
        known: whether the right answer is known here; else ``correct`` means nothing.
    """

    correct: bool
    extracted: str | None
    also: Mapping[str, bool] = field(default_factory=dict)
    note: str | None = None
    known: bool = True


@dataclass(frozen=True)
class Score:
    """A share of correct items under one metric.

    Attributes:
        metric: ``accuracy``, or ``accuracy.published``, ``accuracy.flexible`` …
        value: micro or macro average, as the task's protocol says.
        macro: whether subjects count alike, whatever their size.
        parts: value by subject; empty where the task has none.
        categories: value by category, as the protocol groups subjects and averages them.
    """

    metric: str
    value: float
    macro: bool
    n: int
    parts: Mapping[str, float] = field(default_factory=dict)
    categories: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSource:
    """Where benchmark files come from.

    Attributes:
        folder: holds ``mmlu/``, ``ceval/``, ``gsm8k/`` … in the original layouts; None: the hub.
        sample: the suite that ships with qwenq, which is not the benchmark.
    """

    folder: Path | None = None
    sample: bool = False


MakeProgram = Callable[[Item, str], Program]
"""What a sandbox runs, from an item and what was extracted from its answer."""


class Task(Protocol):
    """A benchmark under one protocol.

    Attributes:
        name: ``mmlu``, ``ceval``, ``gsm8k``, ``humaneval`` …
        protocol: whose prompts, extraction and averages.
        version: raised whenever prompts, extraction or averages change: records of another version are void.
        needs_sandbox: answers are code that a sandbox has to run.
        program: what it runs then, else None.
        reference: then: the benchmark's own solution of an item, as ``judge`` extracts it.
        spare: how many of those may fail before the data or the sandbox counts as broken.
    """

    @property
    def name(self) -> str: ...  # noqa: D102  (as above)
    @property
    def protocol(self) -> ProtocolName: ...  # noqa: D102
    @property
    def version(self) -> int: ...  # noqa: D102
    @property
    def needs_sandbox(self) -> bool: ...  # noqa: D102
    @property
    def program(self) -> MakeProgram | None: ...  # noqa: D102
    @property
    def reference(self) -> Callable[[Item], str] | None: ...  # noqa: D102
    @property
    def spare(self) -> int: ...  # noqa: D102

    def items(self, source: DataSource, subjects: Sequence[str], shots: int | None) -> list[Item]:
        """All items, validated; of these subjects only, unless none are given.

        ``shots``: how many examples each item shows; None for the protocol's own number.

        Raises:
            DataError: no data, broken data, or a subject that does not exist.
        """
        ...

    def request(self, item: Item) -> Request:
        """What to ask."""
        ...

    def judge(self, item: Item, answer: Any) -> Judgement:
        """What the answer was worth; runs no code: a sandbox runs ``program``."""
        ...

    def scores(self, judged: Sequence[tuple[Item, Judgement]]) -> list[Score]:
        """The main score first."""
        ...

    def notes(self, items: Sequence[Item]) -> list[str]:
        """What has to be said of these items beside their score: which subjects the set lacks."""
        ...
