"""Format figures, in one place, so that every form of a report shows the same digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwenq.reporting.text import clean

GIB = 2**30


@dataclass(frozen=True)
class Format:
    """How the values of a metric are shown.

    Attributes:
        unit: what stands in a heading.
        scale: shown = value × scale.
        write: a scaled number as text.
    """

    unit: str
    scale: float
    write: Callable[[float], str]

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
