"""Two runs row by row: which rows can be compared, how they differ, and whether the difference is real."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qwenq.paired.base import PLAIN
from qwenq.paired.compare import Paired
from qwenq.paired.mcnemar import ALPHA, holm
from qwenq.reporting.collect import PRECISIONS, Collection, Measured
from qwenq.reporting.machine import another_machine
from qwenq.reporting.matching import Match, matched
from qwenq.reporting.significance import other_items, paired
from qwenq.reporting.text import clean
from qwenq.results import Row


@dataclass(frozen=True)
class Metric:
    """How two values of a metric are compared.

    Attributes:
        relation: ``ratio``: new / baseline; ``difference``: new − baseline.
        better: ``up`` or ``down``.
        paired: item by item.
        noisy: two runs of the same code differ; only intervals that do not overlap are a difference.
        machine: means something on one machine only.
    """

    relation: Literal["ratio", "difference"]
    better: Literal["up", "down"]
    paired: bool = False
    noisy: bool = False
    machine: bool = False


METRICS: dict[str, Metric] = {
    "accuracy": Metric("difference", "up", paired=True),
    "same_top": Metric("difference", "up"),
    "kl": Metric("difference", "down"),
    "perplexity": Metric("ratio", "down"),
    "speed": Metric("ratio", "up", noisy=True, machine=True),
    "time": Metric("ratio", "down", noisy=True, machine=True),
    "energy": Metric("ratio", "down", noisy=True, machine=True),
    "bandwidth": Metric("ratio", "up", noisy=True, machine=True),
    "memory": Metric("ratio", "down", machine=True),
    "size": Metric("ratio", "down"),
}
"""By the part of a metric's name before the dot."""


@dataclass(frozen=True)
class Comparison:
    """A row of the baseline and its match.

    Attributes:
        before, after: one of both may be missing.
        change: ratio or difference, as the metric has it; None where there is none.
        real: whether the difference is more than noise; None: nobody can tell.
        why: why the rows cannot be compared, or why nobody can tell; empty otherwise.
        comparable: the two figures are of the same thing.
        pairing, p: of accuracies; p is corrected, see `corrected`.
        kindest: of ratios with intervals, the one best for the new run that the intervals allow.
    """

    before: Row | None
    after: Row | None
    comparable: bool = False
    change: float | None = None
    real: bool | None = None
    why: str = ""
    pairing: Paired | None = None
    p: float | None = None
    kindest: float | None = None

    @property
    def row(self) -> Row:
        """The baseline's row, or the new one where the baseline has none."""
        row = self.before or self.after
        assert row is not None  # noqa: S101 - the constructor's callers give one of both
        return row

    @property
    def metric(self) -> Metric | None:
        """How it is compared."""
        return METRICS.get(self.row.metric.partition(".")[0])

    @property
    def worse(self) -> bool:
        """Whether the change goes the wrong way, real or not; of accuracies by item, as they are tested."""
        if self.pairing is not None:
            return self.pairing.lost > self.pairing.won
        return self.score_is_worse

    @property
    def score_is_worse(self) -> bool:
        """Whether the value went the wrong way; averaged over subjects, it may where the items did not."""
        if self.change is None or self.metric is None:
            return False
        neutral = 1.0 if self.metric.relation == "ratio" else 0.0
        return self.change < neutral if self.metric.better == "up" else self.change > neutral

    @property
    def name(self) -> str:
        """``Int4 accuracy: task mmlu, protocol card``."""
        model = self.row.model
        precision = PRECISIONS.get(model.precision, model.precision)
        point = ", ".join(f"{key} {value}" for key, value in self.row.point.items() if value is not None)
        return clean(f"{precision} {self.row.metric}{f': {point}' if point else ''}")


def compare(baseline: Collection, new: Collection) -> list[Comparison]:
    """Every row of the baseline with its match in the new run, then what the baseline does not have."""
    olds, news = list(_with_sizes(baseline.measured)), list(_with_sizes(new.measured))
    strangers = _other_bases(olds, news)
    made, used = [], set()
    for old, match in zip(olds, matched(olds, news), strict=True):
        used |= {id(item) for item in match.found}
        stranger = bool(match.found) and old.row.model.family in strangers
        made.append(_apart_as(OTHER_WEIGHTS, old, match) if stranger else _compared(old, match, news))
    made += [Comparison(None, item.row) for item in news if id(item) not in used]
    return corrected(made, lambda item: True)


OTHER_WEIGHTS = "another model: other weights under the same name"


def _other_bases(olds: list[Measured], news: list[Measured]) -> set[str]:
    """Families whose unquantised weights are others in the new run: what was made of them is, too."""
    before, after = _bases(olds), _bases(news)
    return {family for family in before.keys() & after.keys() if before[family].isdisjoint(after[family])}


def _bases(items: list[Measured]) -> dict[str, set[str]]:
    """Fingerprints of each family's unquantised weights: of what a file stores, whatever it is run in.

    Of those that were measured, and of those that quantised ones were made of, where rows know them.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for item in items:
        if (base := _base_of(item.row)) is not None:
            found[item.row.model.family].add(base)
    return found


def _base_of(row: Row) -> str | None:
    """The unquantised weights that a row is of, or of which its model was made; None: it does not say."""
    if row.model.precision in PLAIN:
        return row.model.fingerprint
    named = row.details.get("base")
    return named if isinstance(named, str) else None


def _apart_as(why: str, old: Measured, match: Match) -> Comparison:
    return Comparison(old.row, match.found[0].row, why=why)


def _with_sizes(measured: Iterable[Measured]) -> Iterator[Measured]:
    """The rows, and a row of its bytes for each model that has none."""
    items = list(measured)
    yield from items
    known = {item.row.model for item in items if item.row.metric == "size"}
    for item in {item.row.model: item for item in items}.values():
        model = item.row.model
        if model.nbytes is not None and model not in known:
            yield replace(item, row=Row("size", model, {}, float(model.nbytes), "bytes"))


def _compared(old: Measured, match: Match, news: list[Measured]) -> Comparison:
    if old.row.status != "ok" and not (match.found and match.found[0].row.status == "ok"):
        after = match.found[0].row if match.found else None
        return Comparison(old.row, after, why="not measured in the baseline")
    if match.why:
        return Comparison(old.row, None, why=match.why)
    if not match.found:
        return Comparison(old.row, None, why=_nearest(old.row, news))
    new = match.found[0]
    if old.row.status != "ok":
        return Comparison(None, new.row)
    if why := _apart(old, new):
        return Comparison(old.row, new.row, why=why)
    return _difference(old.row, new.row)


def _apart(old: Measured, new: Measured) -> str:
    """Why two rows of one identity are still not to be compared."""
    metric = METRICS.get(old.row.metric.partition(".")[0])
    if new.row.status != "ok":
        return f"{new.row.status} in the new run: {clean(new.row.reason)}"
    if metric is None:
        return f"no rule for {clean(old.row.metric)}"
    if old.row.unit != new.row.unit:
        return f"another unit: {clean(new.row.unit)} instead of {clean(old.row.unit)}"
    items = other_items(old.row, new.row) if metric.paired else ""
    if why := _other_model(old.row, new.row) or _without_ratio(old.row, new.row, metric) or items:
        return why
    before, after = (item.row.settings.get("dtype") for item in (old, new))
    if before != after and old.row.metric != "size":
        return clean(f"another dtype: {after or 'unknown'} instead of {before or 'unknown'}")
    return another_machine(old, new) if metric.machine else ""


def _without_ratio(old: Row, new: Row, metric: Metric) -> str:
    """No speed, time or size is zero or less: such a figure is a mistake, and nothing is better than it."""
    if metric.relation != "ratio":
        return ""
    for row, which in ((old, "the baseline's"), (new, "the new run's")):
        if row.value is not None and row.value <= 0:
            return f"{which} figure is {row.value:g}: there is no ratio to it"
    return ""


LOADING = ("size", "memory.load", "memory.unreset")
"""Metrics that a model rounded on the fly and one read from a folder do not have in common."""


def _other_model(old: Row, new: Row) -> str:
    """Why two models of one name and precision are not to be compared; empty where they may be.

    Unquantised ones are the same weights. Of one that was rounded on the fly the speed is a folder's, as that
    depends on no integer. Its bytes are those of no file, and while it is loaded the model that it is made
    from is in memory, too.
    """
    if old.model.precision in PLAIN:
        return "" if old.model.fingerprint == new.model.fingerprint else OTHER_WEIGHTS
    bases = [_base_of(row) for row in (old, new)]
    if None not in bases and bases[0] != bases[1]:
        return OTHER_WEIGHTS
    made = [row.model.rounded_from for row in (old, new)]
    if None not in made:
        return "" if made[0] == made[1] else OTHER_WEIGHTS
    if made[0] == made[1]:
        return ""
    groups = (new.model.group_size, old.model.group_size)
    if groups[0] != groups[1]:
        return f"another model: groups of {groups[0]} instead of {groups[1]}"
    kinds = ["a quantised folder" if base is None else "rounding on the fly" for base in made]
    return f"another way to make it: {kinds[1]} instead of {kinds[0]}" if old.metric in LOADING else ""


NAMING = ("task", "context", "tokens")
"""Keys of a point without which another row is another measurement, not this one measured otherwise."""


def _nearest(row: Row, news: list[Measured]) -> str:
    """What the new run has in the place of a row that it does not have."""
    alike = [
        item.row
        for item in news
        if (item.row.metric, item.row.model.precision) == (row.metric, row.model.precision)
        and all(item.row.point.get(key) == row.point.get(key) for key in NAMING)
    ]
    family = [other for other in alike if other.model.family == row.model.family]
    if not alike:
        return "missing in the new run"
    if not family:
        return f"another model: {clean(alike[0].model.family)} instead of {clean(row.model.family)}"
    other = min(family, key=lambda other: len(_differing(row, other)))
    differing = _differing(row, other)
    shown = (f"another {key}: {other.point.get(key)} instead of {row.point.get(key)}" for key in differing)
    return clean("; ".join(shown))


def _differing(row: Row, other: Row) -> list[str]:
    keys = dict.fromkeys([*row.point, *other.point])
    return [key for key in keys if str(row.point.get(key)) != str(other.point.get(key))]


def _difference(before: Row, after: Row) -> Comparison:
    metric = METRICS[before.metric.partition(".")[0]]
    old, new = before.value or 0.0, after.value or 0.0
    change = new / old if metric.relation == "ratio" else new - old
    made = Comparison(before, after, comparable=True, change=change, real=new != old)
    if metric.paired:
        pairing = paired(before, after)
        if isinstance(pairing, str):
            return replace(made, real=None, why=pairing)
        return replace(made, pairing=pairing)  # whether it is real, `corrected` says
    if metric.noisy:
        kindest = _kindest(before, after, metric)
        return replace(made, real=_disjoint(before, after), why=_no_interval(before, after), kindest=kindest)
    return made


def _disjoint(before: Row, after: Row) -> bool | None:
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None
    return before.high < after.low or after.high < before.low


def _kindest(before: Row, after: Row, metric: Metric) -> float | None:
    """None without intervals, and where the baseline's reaches zero: a ratio to that says nothing."""
    divisor, dividend = (before.low, after.high) if metric.better == "up" else (before.high, after.low)
    return dividend / divisor if dividend is not None and divisor is not None and divisor > 0 else None


def _no_interval(before: Row, after: Row) -> str:
    return "measured once: no interval says how much is noise" if _disjoint(before, after) is None else ""


def corrected(made: Sequence[Comparison], asked: Callable[[Comparison], bool]) -> list[Comparison]:
    """Holm's correction over the paired tests that are asked for: of many, one looks worse by chance.

    The others keep the p that they have: a test that nobody asked for must not hide a loss that somebody
    asked about.
    """
    tested = {index: item.pairing for index, item in enumerate(made) if item.pairing and asked(item)}
    p_values = dict(zip(tested, holm([pairing.p for pairing in tested.values()]), strict=True))
    return [
        replace(item, p=p, real=p < ALPHA) if (p := p_values.get(index)) is not None else item
        for index, item in enumerate(made)
    ]
