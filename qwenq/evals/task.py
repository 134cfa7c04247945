"""Define items, requests, answers and scores.

A task knows no model, tokenizer or engine: it makes a request for each item (``Choose`` one of some
continuations, or ``Write`` text) and judges the answer. ``evals.run`` turns requests into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwenq.evals.sandbox.programs import Program

ProtocolName = Literal["card", "base", "lm-eval"]
Message = Mapping[str, str]
"""A message of a chat: ``role`` and ``content``."""
Prompt = str | tuple[Message, ...]
"""Plain text (no special token is parsed in it), or messages for the model's chat template."""

SYSTEM = "You are a helpful assistant."
"""System message of Qwen's chat scripts, given explicitly: a model's template may have another."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in the task: ``abstract_algebra/12``, ``HumanEval/3``.
        subject: the group that it is averaged with; None where the task has no subjects.
        data: the row of the data file.
        shots: rows shown before it, in order.
    """

    id: str
    subject: str | None
    data: Mapping[str, str]
    shots: tuple[Mapping[str, str], ...] = ()


def first_turn(text: str) -> tuple[Message, ...]:
    """Return a chat of the system message and this question, as in Qwen's scripts."""
    return ({"role": "system", "content": SYSTEM}, {"role": "user", "content": text})


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
    """Return the text without white space around it, as Qwen's chat scripts do.

    Their ``model.chat`` also drops the last token of an answer that is cut at the limit; here it stays.
    """
    return answer.text.strip()


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
    """Verdict on an answer.

    Attributes:
        correct: the task's main metric.
        extracted: the final answer found in the text; None: nothing was found.
        also: further verdicts by metric name, such as ``published`` or ``flexible``.
        note: a reason, such as the sandbox's verdict on a program.
        known: whether the right answer is published; else ``correct`` means nothing.
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
        value: micro or macro average, as the protocol defines it.
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
    """Source of benchmark files.

    Attributes:
        folder: holds ``mmlu/``, ``ceval/``, ``gsm8k/`` … in the original layouts; None: the hub.
        sample: the suite that ships with qwenq, which is not the benchmark.
    """

    folder: Path | None = None
    sample: bool = False


MakeProgram = Callable[[Item, str], Program]
"""Make the program for the sandbox from an item and the code extracted from its answer."""
