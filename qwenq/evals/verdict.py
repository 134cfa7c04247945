"""Judge the cost of quantising by two figures.

=========  ===============  ===============  ============================================================
word       KL (nats)        same top token   reached by
=========  ===============  ===============  ============================================================
excellent  up to 0.01       95 % and more    a sound Int8; 6 bits of an 8B model
good       up to 0.05       90 % and more    a sound Int4 of a 7B model
fair       up to 0.25       75 % and more    a sound Int4 below 1B parameters: each weight carries more
poor       up to 2          30 % and more    of little use
broken     above, or NaN    below            a defect, or another model's weights
=========  ===============  ===============  ============================================================

Both figures must reach a band. The same bands hold for all bits, because the word says how near the model is
to its base. They are our own choice, set by llama.cpp's published figures for Llama-3-8B on WikiText-2:
q8_0 .0014 and 97.7 %, q6_K .0055 and 96.0 %, q4_K_M .031 and 91.9 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Word = Literal["excellent", "good", "fair", "poor", "broken"]

BANDS: tuple[tuple[Word, float, float, str], ...] = (
    ("excellent", 0.01, 0.95, "hardly distinguishable from its base"),
    ("good", 0.05, 0.90, "what a sound Int4 of a 7B model reaches"),
    ("fair", 0.25, 0.75, "a visible loss; usual for Int4 below 1B parameters, too much for a large model"),
    ("poor", 2.0, 0.30, "a heavy loss; use more bits, smaller groups, or better calibration text"),
)
"""Word, largest mean KL in nats, smallest share of same top tokens, meaning; the first that fits counts."""
BROKEN = "not the model it was made from: a defect, damaged weights, or another base"
INT8_USUAL = 0.01
"""Mean KL in nats that a sound Int8 stays below at any size; published: .0014 for 8B."""


@dataclass(frozen=True)
class Verdict:
    """A word and a sentence that explains it."""

    word: Word
    sentence: str

    def __str__(self) -> str:
        return f"{self.word}: {self.sentence}"


def judge(kl: float, same_top: float, bits: int) -> Verdict:
    """Return the verdict on a mean KL (nats), a share of same top tokens and the bits of the weights."""
    measured = f"KL {kl:.4f} nats, same top token {same_top:.1%}"
    for word, largest, smallest, meaning in BANDS:
        if math.isfinite(kl) and kl <= largest and same_top >= smallest:
            usual = f"; Int8 usually stays below {INT8_USUAL}" if bits == 8 and kl > INT8_USUAL else ""
            return Verdict(word, f"{measured}: {meaning}{usual}")
    if not math.isfinite(kl):
        return Verdict("broken", "its logits are not finite: weights or activations overflow")
    return Verdict("broken", f"{measured}: {BROKEN}")
