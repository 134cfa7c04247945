"""Find and compare final answers of mathematics.

Two answers are the same if their normal forms are equal as text, or both are numbers of one value, or lists
of one shape with equal parts. There is no algebra: ``x + 1`` and ``1 + x`` differ, as in the score
of Hendrycks et al., so a score is a lower bound of one that simplifies with a computer algebra system.
"""

from __future__ import annotations

import re
from fractions import Fraction

BOXES = re.compile(r"\\f?boxed\s*|\\fbox\s*")
STATED = re.compile(r"[Ff]inal [Aa]nswer is:?\s*(.+?)\s*\.?\s*(?:I hope it is correct|$)", re.MULTILINE)
"""The end of the Minerva prompt's examples."""

_SPACES = re.compile(r"\\[,;:! ]|~|\\quad|\\qquad|\s+")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree")
_PERCENT = re.compile(r"\\?%")
_MONEY = re.compile(r"\\\$")
_UNITS = re.compile(r"(?<=.)\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(?:\^\{?\d\}?)?$", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)|(\{[^{}]*\}))(?:(\d)|(\{[^{}]*\}))")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9A-Za-z])")
_NAMED = re.compile(r"^[A-Za-z](?:\([A-Za-z]\))?(?:=|\\in)(?=.)")
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")
_DECIMAL = re.compile(r"^[+-]?(?:\d+\.?\d*|\.\d+)$")
_QUOTIENT = re.compile(r"^([+-]?)(\d*)\\frac\{([+-]?\d+)\}\{(\d+)\}$")
_SLASH = re.compile(r"^([+-]?\d+)/(\d+)$")
_OPEN, _CLOSE = "([{", ")]}"
_LONGEST = 200  # characters of an answer that is still read as a number


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{…}`` or ``\fbox{…}``; None without a closed one."""
    found = list(BOXES.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for place, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:place]
    return None


def stated(text: str) -> str | None:
    """Return the text behind the first "final answer is", to the end of its sentence."""
    match = STATED.search(text)
    return match.group(1) if match else None


def same_answer(one: str, other: str) -> bool:
    """Return whether two answers are the same, without algebra."""
    return _same(normal(one), normal(other))


def normal(text: str) -> str:
    r"""Return the normal form of an answer: that of ``$x=\dfrac12\text{ cm}$.`` is ``\frac{1}{2}``."""
    text = text.strip().rstrip(".").strip()
    if (box := boxed(text)) is not None:
        text = box
    text = _MONEY.sub("", text).replace("$", "").removeprefix(r"\(").removesuffix(r"\)").strip()
    text = _UNITS.sub("", text.rstrip(". "))
    text = _WORDS.sub(r"\1", text)
    for pattern in (_SIZES, _DEGREES, _PERCENT):
        text = pattern.sub("", text)
    text = _FRACTIONS.sub(r"\\frac", text).replace("{,}", ",").replace(r"\{", "{").replace(r"\}", "}")
    text = _SPACES.sub("", text)
    text = _SHORT_FRACTION.sub(_long_fraction, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _NAMED.sub("", text)
    return text.replace(",", "") if _THOUSANDS.match(text) else text


def number(text: str) -> Fraction | None:
    r"""Return the value of a normal form (decimal, ``\frac{a}{b}``, ``a\frac{b}{c}``, ``a/b``), or None."""
    if len(text) > _LONGEST:
        return None
    if _DECIMAL.match(text):
        return Fraction(text)
    if match := _SLASH.match(text):
        return _ratio(match.group(1), match.group(2))
    if match := _QUOTIENT.match(text):
        sign, whole, above, below = match.groups()
        ratio = _ratio(above, below)
        value = None if ratio is None else Fraction(int(whole or 0)) + ratio
        return -value if value is not None and sign == "-" else value
    return None


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = number(one), number(other)
    if first is not None or second is not None:
        return first == second
    ours, theirs = _parts(one), _parts(other)
    return len(ours) == len(theirs) > 1 and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _parts(text: str) -> list[str]:
    """Split at commas outside of inner brackets; the outer brackets come first and last."""
    around = text[:1] in _OPEN and text[-1:] in _CLOSE and len(text) > 1
    inner = text[1:-1] if around else text
    parts, depth = [""], 0
    for char in inner:
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if len(parts) == 1:
        return [text]
    return [text[0], *parts, text[-1]] if around else parts


def _ratio(above: str, below: str) -> Fraction | None:
    return Fraction(int(above), int(below)) if int(below) else None


def _long_fraction(match: re.Match[str]) -> str:
    above, below = (match[1] or match[2].strip("{}")), (match[3] or match[4].strip("{}"))
    return rf"\frac{{{above}}}{{{below}}}"
