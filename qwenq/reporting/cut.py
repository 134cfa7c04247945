"""Count answers that were cut at their limit of tokens, most of which are judged wrong."""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.results import Row

MANY = 0.02
"""Share of cut answers above which a score is not to be read without a warning."""


@dataclass(frozen=True)
class Cut:
    """How many of the written answers of one row reached their limit."""

    answers: int
    of: int

    @property
    def share(self) -> float:
        """Return the share of all written answers."""
        return self.answers / self.of

    @property
    def many(self) -> bool:
        """Return whether the score needs a warning."""
        return self.share > MANY

    @property
    def warning(self) -> str:
        """Return what a reader must know; of few as of many."""
        return (
            f"{self.answers:,} of {self.of:,} answers ({self.share:.1%}) were cut at their limit of tokens "
            "and are judged as far as they go: raise --max-new-tokens"
        )


def cut_of(row: Row) -> Cut | None:
    """Return the cut answers of a row of accuracy; None where none were written, or nobody counted."""
    found = row.details.get("cut")
    if not isinstance(found, dict):
        return None
    answers, of = found.get("answers"), found.get("of")
    if type(answers) is not int or type(of) is not int or not 0 <= answers <= of or of == 0:
        return None
    return Cut(answers, of)


LETTERS = ("mmlu", "ceval", "ceval-test", "cmmlu")


def asked_by(row: Row) -> str:
    """Return how answers were got: ``logits`` or ``generation``.

    Rows of before this was recorded: the base protocols score letters, all else is written.
    """
    asked = row.settings.get("asked")
    if asked in ("logits", "generation"):
        return str(asked)
    letters = row.point.get("task") in LETTERS and row.point.get("protocol") != "card"
    return "logits" if letters else "generation"
