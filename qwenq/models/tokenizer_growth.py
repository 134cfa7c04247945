"""A tokenizer.json whose rules blow a text up: thirty rules "a" → "aa" make a gigabyte of one letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError

MOST = 256.0
"""Times that a text may grow in normalising or decoding; real tokenizers stay below ten."""


def refuse_growth(loaded: Any, path: Path) -> None:
    """Multiply how much each replacement rule can lengthen a text, in the normalizer and in the decoder.

    Args:
        loaded: transformers' tokenizer.
        path: for the message.

    Raises:
        ModelError: more than ``MOST`` times.
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


def _growth(rule: Any) -> float:
    """How many times as long a long text can become."""
    if not isinstance(rule, dict):
        return 1.0
    times = 1.0
    for inner in (*(rule.get("normalizers") or []), *(rule.get("decoders") or [])):
        times *= _growth(inner)
    if rule.get("type") == "Replace":
        pattern = rule.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        made = len(str(rule.get("content", "")))
        # A regular expression may match a single character, or nothing before each one.
        times *= max(1.0, made / len(literal)) if literal else 1.0 + made
    return times
