"""Make text of rows safe to show: names, reasons and settings are untrusted.

HTML is escaped by the template engine; what is stripped here must reach no reader: escape
sequences that drive terminals, control characters, and marks that turn the direction of what follows.
"""

from __future__ import annotations

import re

LONGEST = 400
"""Characters of one text that are shown."""
LONGEST_COMMAND = 10_000
"""A command that is cut short would be another command."""

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


def markdown(text: object) -> str:
    """Return ``clean`` text that GitHub's Markdown shows as is, without markup, HTML, links or mentions."""
    shown = _MARKUP.sub(r"\\\g<0>", clean(text))
    shown = _LINK.sub(lambda found: ":\\/\\/" if found[0] == "://" else "\\.", shown)
    shown = shown.replace("@", "@&#8203;")  # a zero-width space: no mention, no mail address
    return re.sub(r"^([-+=]|\d+(?=[.)](\s|$)))", lambda found: _at_start(found[0]), shown)


def _at_start(found: str) -> str:
    """Escape what would begin a list or underline a heading."""
    return f"\\{found}" if found in "-+=" else f"{found}&#8203;"


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
