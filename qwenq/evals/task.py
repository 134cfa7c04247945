"""Define what a benchmark is: items, a request for each, a judgement on each answer, scores of all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from qwenq.errors import UsageError
from qwenq.evals.sandbox.run import Program

# A task knows no model, tokenizer or engine: it makes a request for each item (``Choose`` one of some
# continuations, or ``Write`` text) and judges the answer. ``evals.run`` turns requests into tokens.


ProtocolName = Literal["card", "base", "lm-eval"]
Message = Mapping[str, str]
"""A message of a chat: ``role`` and ``content``."""
Prompt = str | tuple[Message, ...]
"""Plain text (no special token is parsed in it), or messages for the model's chat template."""

SYSTEM = "You are a helpful assistant."
"""System message of Qwen's chat scripts, given explicitly: a model's template may have another."""


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str  # unique in the task: ``abstract_algebra/12``, ``HumanEval/3``
    subject: str | None  # the group that it is averaged with; None where the task has no subjects
    data: Mapping[str, str]  # the row of the data file
    shots: tuple[Mapping[str, str], ...] = ()  # rows shown before it, in order


@dataclass(frozen=True)
class Choose:
    """Request for the likeliest of some continuations of the prompt; no text is generated."""

    prompt: Prompt
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Write:
    """Request for text: stop at an end-of-text id, before any stop string in ``until``, or at the limit."""

    prompt: Prompt
    max_new_tokens: int
    until: tuple[str, ...] = ()


Request = Choose | Write


@dataclass(frozen=True)
class Chosen:
    """Answer to ``Choose``."""

    # float32 log softmax over the vocabulary, summed over each continuation's tokens
    logprobs: tuple[float, ...]
    # the published base scripts' score: softmax over the vocabulary, then over the choices, both in the
    # model's own dtype. Near choices tie there, and the first of them wins. Empty where a server gave the log
    # probabilities, as its dtype is unknown
    published: tuple[float, ...]


@dataclass(frozen=True)
class Written:
    """Answer to ``Write``: the new text without what stopped it, and how many tokens it took."""

    text: str
    tokens: int
    stopped: bool


OPEN, CLOSE = "<think>", "</think>"


def final_answer(written: Written, thinking: bool) -> str:
    """Return the text behind the thoughts; empty where they did not end.

    Args:
        written: all that the model wrote, thoughts included.
        thinking: whether it was asked to think; its thoughts then need not begin with ``<think>``.
    """
    _, close, after = written.text.rpartition(CLOSE)
    if close:
        return after.lstrip("\n")
    return "" if thinking or written.text.lstrip().startswith(OPEN) else written.text


Answer = Chosen | Written


@dataclass(frozen=True)
class Judgement:
    """Verdict on an answer."""

    correct: bool  # the task's main metric
    extracted: str | None  # the final answer found in the text; None: nothing was found
    # further verdicts by metric name, such as ``published`` or ``flexible``
    also: Mapping[str, bool] = field(default_factory=dict)
    note: str | None = None  # a reason, such as the sandbox's verdict on a program


@dataclass(frozen=True)
class Score:
    """A share of correct items under one metric."""

    metric: str  # ``accuracy``, or ``accuracy.published``, ``accuracy.flexible`` …
    value: float  # micro or macro average, as the protocol defines it
    macro: bool  # whether subjects count alike, whatever their size
    verdicts: Sequence[bool]  # what is averaged: one an item, but for tasks that judge parts of an answer
    # value by subject; empty where the task has none
    parts: Mapping[str, float] = field(default_factory=dict)
    # value by category, as the protocol groups subjects and averages them
    categories: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSource:
    """Source of benchmark files."""

    # holds ``mmlu/``, ``ceval/``, ``gsm8k/`` … in the original layouts; None: the hub
    folder: Path | None = None
    sample: bool = False  # the suite that ships with qwenq, which is not the benchmark


# Average verdicts over items (micro) or over subjects (macro).


Judged = Sequence[tuple[Item, Judgement]]
MAIN = "accuracy"


def score_all(
    judged: Judged, *, macro: bool = False, categories: Mapping[str, Sequence[str]] | None = None
) -> list[Score]:
    """Return the main score, then one for each further verdict of all items (``accuracy.published``).

    Args:
        judged: at least one item.
        macro: subjects count alike; else items do. Categories are averaged the same way inside.
        categories: subjects by category; a subject may be in several. Those without items are left out.
    """
    verdicts = {MAIN: [(item.subject, verdict.correct) for item, verdict in judged]}
    for name in judged[0][1].also:
        if all(name in verdict.also for _, verdict in judged):
            verdicts[f"{MAIN}.{name}"] = [(item.subject, verdict.also[name]) for item, verdict in judged]
    return [_score(metric, found, macro, categories or {}) for metric, found in verdicts.items()]


def _score(
    metric: str,
    verdicts: Sequence[tuple[str | None, bool]],
    macro: bool,
    categories: Mapping[str, Sequence[str]],
) -> Score:
    by_subject: dict[str | None, list[bool]] = defaultdict(list)
    for subject, correct in verdicts:
        by_subject[subject].append(correct)

    def average(subjects: Iterable[str | None]) -> float:
        groups = [by_subject[subject] for subject in subjects]
        return mean(list(map(mean, groups)) if macro else [one for group in groups for one in group])

    present = {name: [one for one in by_subject if one in members] for name, members in categories.items()}
    return Score(
        metric,
        average(by_subject),
        macro,
        [correct for _, correct in verdicts],
        parts={subject: mean(group) for subject, group in by_subject.items() if subject is not None},
        categories={name: average(subjects) for name, subjects in present.items() if subjects},
    )


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


# Compose a benchmark under one protocol from data: prompts are templates, filled from an item's row.


Fill = Callable[[Mapping[str, str]], Mapping[str, str]]
"""Make what templates show of a row, where that is not the row itself."""
LETTERS = tuple(ascii_uppercase[:10])
"""Names of options; a row has as many of them as it has options."""


@dataclass(frozen=True)
class Task:
    """A benchmark under one protocol: copy ``tasks/gsm8k.py`` for a new one.

    In templates, ``{options}`` are the lines of a row's options, and ``{subject}`` is the item's in words.
    """

    name: str  # ``mmlu``, ``gsm8k`` …
    protocol: ProtocolName  # whose prompts, extraction and averages it uses; ``card`` asks in a chat
    version: int  # raised whenever prompts, extraction or averages change: older records are not used then
    # items of a source, of these subjects (none: all), each with this many examples
    load: Callable[[DataSource, Sequence[str], int], list[Item]]
    question: str  # template of the item, which the prompt ends with
    judge: Callable[[Item, Any], Judgement]  # the judgement on an item's answer; it runs no code
    shots: int = 0  # default number of examples
    allowed_shots: Sequence[int] = (0,)  # numbers of examples that the protocol has a prompt for
    header: str = ""  # template that the prompt begins with
    shot: str = ""  # template of an example
    alone: str = ""  # template of the item where no example is shown; empty: as with examples
    option: str = "{letter}. {text}"  # template of an option's line
    fill: Fill = dict  # what the templates are filled with
    system: str | None = SYSTEM  # the chat's first message; None: there is none
    max_new_tokens: int = 512  # limit of a written answer
    until: tuple[str, ...] = ()  # strings that end a written answer
    # template of the continuations to choose from, one a letter; empty: the answer is written
    choices: str = ""
    average: Callable[[Judged], list[Score]] = score_all  # scores, the main one first
    subjects: Collection[str] = ()  # all of the benchmark's; empty: it has none
    # the sandbox's program for an item and the extracted code; None: nothing has to be run
    program: Callable[[Item, str], Program] | None = None
    # the benchmark's own solution of an item, where there are programs
    reference: Callable[[Item], str] | None = None
    spare: int = 0  # references that may fail before the data or the sandbox counts as broken

    @property
    def needs_sandbox(self) -> bool:
        """Return whether the answers are code that has to be run."""
        return self.program is not None

    def items(self, source: DataSource, subjects: Sequence[str] = (), shots: int | None = None) -> list[Item]:
        """Return all items, validated, with examples of a number that this protocol has a prompt for."""
        wanted = self.shots if shots is None else shots
        if wanted not in self.allowed_shots:
            allowed = list(self.allowed_shots)
            taken = " or ".join(map(str, allowed))
            if len(allowed) > 2 and allowed == list(range(allowed[0], allowed[-1] + 1)):
                taken = f"{allowed[0]} to {allowed[-1]}"
            raise UsageError(
                f"{self.name} under the {self.protocol} protocol cannot show {wanted} examples",
                where="--shots",
                hint=f"it takes {taken}; leave the option out for {self.shots}",
            )
        return self.load(source, tuple(subjects), wanted)

    def request(self, item: Item, max_new_tokens: int | None = None) -> Request:
        """Return the request for an item; without a limit of new tokens the task's own."""
        question = self.question if item.shots or not self.alone else self.alone
        shown = "".join(self._filled(self.shot, row, item) for row in item.shots)
        text = self._filled(self.header, {}, item) + shown + self._filled(question, item.data, item)
        prompt: Prompt = text
        if self.protocol == "card":
            first = () if self.system is None else ({"role": "system", "content": self.system},)
            prompt = (*first, {"role": "user", "content": text})
        if self.choices:
            letters = letters_of(item.data)
            return Choose(prompt, tuple(self.choices.format(letter=letter) for letter in letters))
        return Write(prompt, max_new_tokens or self.max_new_tokens, self.until)

    def _filled(self, template: str, row: Mapping[str, str], item: Item) -> str:
        found = self.fill(row) if row else row
        lines = (self.option.format(letter=letter, text=found[letter]) for letter in letters_of(found))
        subject = (item.subject or "").replace("_", " ")
        return template.format_map({"options": "\n".join(lines), "subject": subject, **found})

    def scores(self, judged: Judged) -> list[Score]:
        """Return the scores, the main one first; none without items."""
        return self.average(judged) if judged else []

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Return a notice where these items are of a part of the subjects."""
        covered = {item.subject for item in items} & set(self.subjects)
        if not covered or len(covered) == len(self.subjects):
            return []
        some = f"{len(covered)} of the {len(self.subjects)} subjects of {self.name}"
        return [f"{some}: not comparable with a score over all of them"]


def letters_of(row: Mapping[str, str]) -> list[str]:
    """Return the letters of a row's options."""
    return [letter for letter in LETTERS if letter in row]
