"""Refuse tokenizer files that blow up: a text, by their rules, or the tokenizer, by its ids.

Thirty rules "a" → "aa" make a gigabyte of one letter. A vocabulary with one id of two thousand million is
written out by the library with a list of all ids that are missing: gigabytes, and where there is no memory
for them, the library ends the process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError

MOST = 256.0
"""Times that a text may grow in normalising or decoding; real tokenizers stay below ten."""
HOLES = 1_000_000
"""Ids that a vocabulary may leave out: a bound of ours, not a measured one."""


def refuse_holes(loaded: Any, path: Path) -> None:
    """Compare the largest id with the number of tokens.

    Args:
        loaded: transformers' tokenizer.
        path: for the message.
    """
    ids = loaded.get_vocab().values()
    largest = max(ids, default=0)
    if largest > len(ids) + HOLES:
        raise ModelError(
            f"the vocabulary has {len(ids)} tokens and an id of {largest}",
            where=path,
            hint="the file is damaged, or not to be trusted; download it again from where you trust it",
        )


def refuse_growth(loaded: Any, path: Path) -> None:
    """Multiply how much each rule can lengthen a text, in normalizer and decoder; count its copies.

    Args:
        loaded: transformers' tokenizer.
        path: for the message.
    """
    backend = getattr(loaded, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        rules = getattr(backend, part, None)
        if rules is not None and (times := _growth(json.loads(rules.__getstate__()))) > MOST:
            raise ModelError(
                f"the {part} of this tokenizer could make a text {times:.3g} times as long",
                where=path,
                hint="do not trust this model; no real tokenizer does that",
            )
    processor = getattr(backend, "post_processor", None)
    if processor is not None and (times := _copies(json.loads(processor.__getstate__()))) > 1:
        raise ModelError(
            f"the post_processor of this tokenizer gives each text {times} times",
            where=path,
            hint="do not trust this model; no real tokenizer does that",
        )


def _copies(rule: Any) -> int:
    """Count how often the ids of a single text are in what comes out, special tokens aside."""
    if not isinstance(rule, dict):
        return 1
    times = 1
    for inner in rule.get("processors") or []:
        times *= _copies(inner)
    return times * max(1, sum("Sequence" in piece for piece in rule.get("single") or []))


def _growth(rule: Any) -> float:
    """Return how many times as long a long text can become."""
    if not isinstance(rule, dict):
        return 1.0
    times = 1.0
    for inner in (*(rule.get("normalizers") or []), *(rule.get("decoders") or [])):
        times *= _growth(inner)
    if rule.get("type") == "Prepend":
        times *= 1.0 + len(str(rule.get("prepend", "")))  # of the shortest text
    if rule.get("type") == "Replace":
        pattern = rule.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        made = len(str(rule.get("content", "")))
        # A regular expression may match a single character, or nothing before each one.
        times *= max(1.0, made / len(literal)) if literal else 1.0 + made
    return times
