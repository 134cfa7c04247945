"""Make text of rows safe to show, and format figures, the same for every form of a report."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# Make text of rows safe to show: names, reasons and settings are untrusted.
#
# HTML is escaped by the template engine; what is stripped here must reach no reader: escape
# sequences that drive terminals, control characters, and marks that turn the direction of what follows.


LONGEST = 400
"""Characters of one text that are shown."""
LONGEST_COMMAND = 10_000
"""A command that is cut short would be another command."""
LONGEST_SENTENCE = 4_000
"""Our own sentences, made of several names and figures; a headline cut short would lose its verdict."""

_TERMINAL = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|$)"  # OSC and its like: titles, links
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)
_UNSEEN = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufffe\uffff]"
)
_HALF = re.compile(r"[\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


def clean(text: object, longest: int = LONGEST) -> str:
    """Return one line of visible text, at most ``longest`` characters."""
    shown = _TERMINAL.sub("", str(text))
    shown = _SPACE.sub(" ", _HALF.sub("\ufffd", _UNSEEN.sub("", shown))).strip()
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


_MARKUP = re.compile(r"[\\`*\[\]<>|~&$#!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_LINK = re.compile(r"://|(?<=www)\.", re.IGNORECASE)


def count(number: object, things: str) -> str:
    """Return ``2 threads`` or ``1 thread``."""
    return f"{number} {things.removesuffix('s') if number == 1 else things}"


def markdown(text: object, longest: int = LONGEST) -> str:
    """Return ``clean`` text that GitHub's Markdown shows as is, without markup, HTML, links or mentions."""
    shown = _MARKUP.sub(r"\\\g<0>", clean(text, longest))
    shown = _LINK.sub(lambda found: ":\\/\\/" if found[0] == "://" else "\\.", shown)
    shown = shown.replace("@", "@&#8203;")  # a zero-width space: no mention, no mail address
    shown = re.sub(r"^[-+=]", r"\\\g<0>", shown)  # it would begin a list or underline a heading
    return re.sub(r"^\d+(?=[.)](\s|$))", r"\g<0>&#8203;", shown)


def code(text: object) -> str:
    """Return ``clean`` text as a code span, whose fence is longer than any run of backticks in it."""
    shown = clean(text, LONGEST_COMMAND)
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")


def spreadsheet(text: object) -> str:
    """Return ``clean`` text that no spreadsheet takes for a formula; some take wide signs for one, too."""
    shown = clean(text)
    return f"'{shown}" if shown[:1] in tuple("=+-@＝＋－＠") else shown


GIB = 2**30


@dataclass(frozen=True)
class Format:
    """How the values of a metric are shown."""

    unit: str  # what stands in a heading
    scale: float  # shown = value × scale
    write: Callable[[float], str]  # a scaled number as text

    def __call__(self, value: float) -> str:
        """Return the value as it is shown."""
        return self.write(value * self.scale)


def fixed(digits: int) -> Callable[[float], str]:
    """Return a function that writes numbers with a number of decimals; zero has no sign."""

    def write(value: float) -> str:
        text = f"{value:.{digits}f}"
        return text.lstrip("-") if not text.strip("-0.") else text

    return write


PERCENT = Format("%", 100, fixed(1))
GIBIBYTES = Format("GiB", 1 / GIB, fixed(2))
_BY_UNIT = {
    "share": PERCENT,
    "tokens/s": Format("tokens/s", 1, fixed(2)),
    "bytes": GIBIBYTES,
    "seconds": Format("ms", 1000, fixed(1)),
    "nats/token": Format("nats", 1, fixed(4)),
    "joules/token": Format("J/token", 1, fixed(3)),
    "ratio": Format("×", 1, fixed(3)),
}
_BY_METRIC = {
    "size": Format("MB", 1e-6, fixed(1)),
    "perplexity": Format("", 1, fixed(3)),
    "perplexity.context": Format("", 1, fixed(2)),
    "bandwidth.share": PERCENT,
}


def format_of(metric: str, unit: str) -> Format:
    """Return how values of a metric are shown; an unknown unit is shown as it is, with four digits."""
    if (special := _BY_METRIC.get(metric)) is not None:
        return special
    return _BY_UNIT.get(unit) or Format(clean(unit), 1, lambda value: f"{value:.4g}")


def signed(value: float, digits: int = 1) -> str:
    """Return a difference with its sign, a true minus; zero has none."""
    text = fixed(digits)(abs(value))
    return text if not text.strip("0.") else f"{'+' if value > 0 else '−'}{text}"
