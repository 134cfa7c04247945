"""Compare two runs row by row: match rows, pool repeats, and tell real differences from noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, NamedTuple

from qwenq.comparison import PLAIN, Paired, corrected_p, other_items, paired
from qwenq.reporting.collect import PRECISIONS, Collection, Measured, machine_difference
from qwenq.reporting.text import clean
from qwenq.results import Row, intervals_overlap
from qwenq.statistics import ALPHA

# Match the rows of two runs: each row of the baseline with at most one row of the new run.
#
# A folder may hold rows of several models of one precision: of other group sizes or names, which
# distinguish them, or of a model that was quantised again later, which only the weights' fingerprint
# distinguishes. The earlier rows of a run that was continued in its folder may even be the baseline's own.
# A gate that took those would pass whatever came after.


_EMPTY_FOLDER = "start each run in an empty folder"


class Match(NamedTuple):
    """What a row of the baseline is compared with: candidates of the new run, or why none of them is it.

    Without a reason there is exactly one candidate, or none at all.
    """

    found: Sequence[Measured] = ()
    why: str = ""


def matched(olds: Sequence[Measured], news: Sequence[Measured]) -> list[Match]:
    """Return the match of each row of the baseline, in order; models distinguish rows of one identity."""
    alike: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    known: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for item in news:
        alike[item.row.identity].append(item)
    for old in olds:
        known[old.row.identity].add(old.row.model.fingerprint)
    found = [_candidates(old, alike[old.row.identity], known[old.row.identity]) for old in olds]
    claims: dict[int, list[Measured]] = defaultdict(list)
    for old, candidates in zip(olds, found, strict=True):
        if old.row.status == "ok" and len(candidates) == 1:
            claims[id(candidates[0])].append(old)
    return [_match(old, candidates, claims) for old, candidates in zip(olds, found, strict=True)]


def _match(old: Measured, found: list[Measured], claims: dict[int, list[Measured]]) -> Match:
    """Match one row; of several rows that claim the same one, that of the most similar model gets it."""
    if len(found) > 1:
        why = f"{len(found)} models of the new run could be the same model: {_EMPTY_FOLDER}"
        return Match(found, why)
    if not found or old.row.status != "ok" or len(rivals := claims[id(found[0])]) == 1:
        return Match(found)
    same = [rival for rival in rivals if rival.row.model.fingerprint == found[0].row.model.fingerprint]
    similar = _most_similar(found[0], same or rivals)
    if not any(old is each for each in similar):
        return Match(why=f"missing in the new run, which has one of {len(rivals)} such models")
    if len(similar) > 1:
        why = f"{len(rivals)} models of the baseline could be the same model: {_EMPTY_FOLDER}"
        return Match(found, why)
    return Match(found)


def _candidates(old: Measured, news: list[Measured], known: set[str]) -> list[Measured]:
    """Return the rows of the same weights, and similar ones of weights that the baseline does not have.

    ``known`` are the fingerprints of the baseline's rows of this identity.
    """
    similar = _most_similar(old, news)
    same = [item for item in news if item.row.model.fingerprint == old.row.model.fingerprint]
    if not same:
        return similar
    new = (item for item in similar if item.row.model.fingerprint not in known)
    return [*_most_similar(old, same), *new]


def _most_similar(old: Measured, news: list[Measured]) -> list[Measured]:
    """Return the rows of the models that share most with the old one's."""
    most = max((_similarity(old, item) for item in news), default=())
    return [item for item in news if _similarity(old, item) == most]


def _similarity(old: Measured, new: Measured) -> tuple[bool, ...]:
    """Return what two models of one precision share: rounded on the fly or not, group size, name."""
    one, other = old.row.model, new.row.model
    method = (one.rounded_from is None) == (other.rounded_from is None)
    return method, one.group_size == other.group_size, one.name == other.name


@dataclass(frozen=True)
class Metric:
    """How two values of a metric are compared."""

    relation: Literal["ratio", "difference"]  # ``ratio``: new / baseline; ``difference``: new − baseline
    better: Literal["up", "down"]  # direction of an improvement
    paired: bool = False  # tested item by item
    # differs between runs of the same code; a difference is real if the intervals do not overlap
    noisy: bool = False
    machine: bool = False  # comparable on one machine only


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
    "failed": Metric("difference", "down", noisy=True),
}
"""By the part of a metric's name before the dot."""


@dataclass(frozen=True)
class Comparison:
    """A row of the baseline and its match in the new run."""

    # before, after: the two rows; one of them may be missing
    before: Row | None
    after: Row | None
    comparable: bool = False  # both figures are of the same measurement
    change: float | None = None  # ratio or difference, as the metric defines it
    real: bool | None = None  # whether the difference is more than noise; None if that is unknown
    why: str = ""  # why the rows are not comparable, or why `real` is unknown; otherwise empty
    # pairing, p: of accuracies; p is corrected, see `corrected`
    pairing: Paired | None = None
    p: float | None = None
    kindest: float | None = None  # the most favourable ratio that both intervals allow

    @property
    def row(self) -> Row:
        """Return the baseline's row, or the new one if the baseline has no such row."""
        row = self.before or self.after
        assert row is not None  # noqa: S101 - the constructor's callers give one of both
        return row

    @property
    def metric(self) -> Metric | None:
        """Return how the rows are compared."""
        return METRICS.get(self.row.metric.partition(".")[0])

    @property
    def worse(self) -> bool:
        """Return whether the change is for the worse, real or not; accuracies by item, as they are tested."""
        if self.pairing is not None:
            return self.pairing.lost > self.pairing.won
        return self.score_is_worse

    @property
    def score_is_worse(self) -> bool:
        """Return whether the value got worse; an average over subjects may, though more items were won."""
        if self.change is None or self.metric is None:
            return False
        neutral = 1.0 if self.metric.relation == "ratio" else 0.0
        return self.change < neutral if self.metric.better == "up" else self.change > neutral

    @property
    def name(self) -> str:
        """Return ``Int4 accuracy: task mmlu, protocol card``."""
        model = self.row.model
        precision = PRECISIONS.get(model.precision, model.precision)
        point = ", ".join(f"{key} {value}" for key, value in self.row.point.items() if value is not None)
        return clean(f"{precision} {self.row.metric}{f': {point}' if point else ''}")


def compare(baseline: Collection, new: Collection) -> list[Comparison]:
    """Compare every row of the baseline with its match, and list the rows that only the new run has."""
    olds, news = list(_with_sizes(baseline.measured)), list(_with_sizes(new.measured))
    before, after = _bases(olds), _bases(news)
    changed = {one for one in before.keys() & after.keys() if before[one].isdisjoint(after[one])}
    made, used = [], set()
    for old, match in zip(olds, matched(olds, news), strict=True):
        used |= {id(item) for item in match.found}
        if match.found and old.row.model.family in changed:
            made.append(Comparison(old.row, match.found[0].row, why=OTHER_WEIGHTS))
        else:
            made.append(_compared(old, match, news))
    made += [Comparison(None, item.row) for item in news if id(item) not in used]
    return corrected(made, lambda item: True)


OTHER_WEIGHTS = "another model: other weights under the same name"


def _bases(items: list[Measured]) -> dict[str, set[str]]:
    """Return fingerprints of each family's unquantised weights, measured or named by quantised models."""
    found: dict[str, set[str]] = defaultdict(set)
    for item in items:
        if (base := _base_of(item.row)) is not None:
            found[item.row.model.family].add(base)
    return found


def _base_of(row: Row) -> str | None:
    """Return the fingerprint of the unquantised weights that a row's model is or was made of, if recorded."""
    if row.model.precision in PLAIN and not row.model.served:
        return row.model.fingerprint
    named = row.details.get("base")
    return named if isinstance(named, str) else None


def _with_sizes(measured: Iterable[Measured]) -> Iterator[Measured]:
    """Yield the rows, and a row of its size for each model that has none."""
    items = list(measured)
    yield from items
    known = {item.row.model for item in items if item.row.metric == "size"}
    for item in {item.row.model: item for item in items}.values():
        model = item.row.model
        if model.nbytes is not None and model not in known:
            yield replace(item, row=Row("size", model, {}, float(model.nbytes), "bytes"))


def _compared(old: Measured, match: Match, news: list[Measured]) -> Comparison:
    new = match.found[0] if match.found else None
    if old.row.status != "ok" and (new is None or new.row.status != "ok"):
        return Comparison(old.row, new.row if new else None, why="not measured in the baseline")
    if match.why or new is None:
        return Comparison(old.row, None, why=match.why or _nearest(old.row, news))
    if old.row.status != "ok":
        return Comparison(None, new.row)
    if why := _not_comparable(old, new):
        return Comparison(old.row, new.row, why=why)
    return _difference(old.row, new.row)


def _not_comparable(old: Measured, new: Measured) -> str:
    """Return why two rows of one identity are not comparable; empty if they are."""
    metric = METRICS.get(old.row.metric.partition(".")[0])
    if new.row.status != "ok":
        return f"{new.row.status} in the new run: {clean(new.row.reason)}"
    if metric is None:
        return f"no rule for {clean(old.row.metric)}"
    if old.row.unit != new.row.unit:
        return f"another unit: {clean(new.row.unit)} instead of {clean(old.row.unit)}"
    items = other_items(old.row, new.row) if metric.paired else ""
    ratio = _no_ratio(old.row, new.row) if metric.relation == "ratio" else ""
    served = old.row.model.served and new.row.model.served  # by one name; their weights are not known
    if why := ("" if served else _other_model(old.row, new.row)) or ratio or items:
        return why
    before, after = (item.row.settings.get("dtype") for item in (old, new))
    if before != after and old.row.metric != "size":
        return clean(f"another dtype: {after or 'unknown'} instead of {before or 'unknown'}")
    return machine_difference(old, new) if metric.machine else ""


def _no_ratio(old: Row, new: Row) -> str:
    """Return which figure is zero or less, a mistake for a speed, time or size; empty for none."""
    for row, side in ((old, "the baseline's"), (new, "the new run's")):
        if row.value is not None and row.value <= 0:
            return f"{side} figure is {row.value:g}: there is no ratio to it"
    return ""


LOADING = ("size", "memory.load", "memory.unreset")
"""Metrics that differ between a model rounded on the fly and one that is read from a folder."""


def _other_model(old: Row, new: Row) -> str:
    """Return why two models of one name and precision are not comparable; empty if they are.

    Unquantised weights must be the same. A model rounded on the fly has the speed of a quantised folder,
    as that depends on no weight's value; but it has no files, and while it is loaded its base is in memory.
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
"""Keys of a point that two rows must share for one to be named as the nearest to the other."""


def _nearest(row: Row, news: list[Measured]) -> str:
    """Return why a row has no match, by the most similar row of the new run."""
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
        return replace(made, pairing=pairing)  # `corrected` decides whether it is real
    if metric.noisy:
        kindest = _kindest(before, after, metric)
        if (overlap := intervals_overlap(before, after)) is None:
            why = "measured once: without an interval, noise is unknown"
            return replace(made, real=None, why=why, kindest=kindest)
        return replace(made, real=not overlap, kindest=kindest)
    return made


def _kindest(before: Row, after: Row, metric: Metric) -> float | None:
    """Return the most favourable ratio; None without intervals, or if the divisor may be zero."""
    divisor, dividend = (before.low, after.high) if metric.better == "up" else (before.high, after.low)
    return dividend / divisor if dividend is not None and divisor is not None and divisor > 0 else None


def corrected(made: Sequence[Comparison], selected: Callable[[Comparison], bool]) -> list[Comparison]:
    """Apply Holm's correction over the selected paired tests: of many, one looks worse by chance.

    The others keep their p, as a test that no condition selects must not hide a loss that one does.
    """
    found = corrected_p([item.pairing if selected(item) else None for item in made])
    return [
        item if p is None else replace(item, p=p, real=p < ALPHA) for item, p in zip(made, found, strict=True)
    ]


# Combine repeated runs of one version on one machine into one run.
#
# The interval of a figure covers variation within its process. Another process would have found another
# figure: the machine has other work, its clock rates change, memory lies elsewhere. Where that matters, two
# versions are measured alternately (before, after, before, after, …); each side's figure is the median of
# its repeats, with an interval that covers them all. A difference between such intervals was there in every
# repeat.
#
# Two sides that differ by chance alone lie apart in one direction once in C(2n, n) times with n repeats on
# each: once in 20 with three, once in 252 with five.


def with_repeats(first: Collection, more: Collection | None, *, judged: bool = False) -> Collection:
    """Return the first run with speeds, times, memory and energy of all repeats.

    Of the others, only figures of the same weights at the same point on the same machine are used: repeating
    anything else adds nothing. On the new side, which is ``judged``, what failed in one repeat has failed; a
    baseline uses the other repeats.
    """
    if more is None:
        return first
    made = [_pooled(item, _repeats(item, more), judged=judged) for item in first.measured]
    return Collection((*first.runs, *more.runs), tuple(made))


def idle_repeats(first: Collection, more: Collection | None) -> list[str]:
    """Return the names of runs that repeat no figure of the first one."""
    if more is None:
        return []
    used = {id(other.run) for item in first.measured for other in _repeats(item, more)}
    return [run.name for run in more.runs if id(run) not in used]


def _repeats(item: Measured, more: Collection) -> list[Measured]:
    """Return the same figure of other runs; none for a metric that is the same in every run."""
    row, metric = item.row, METRICS.get(item.row.metric.partition(".")[0])
    if metric is None or not metric.machine:
        return []
    return [
        other
        for other in more.measured
        if other.row.identity == row.identity
        and other.row.model.fingerprint == row.model.fingerprint
        and other.row.settings.get("dtype") == row.settings.get("dtype")
        and not machine_difference(item, other)
    ]


def _pooled(item: Measured, others: Sequence[Measured], *, judged: bool) -> Measured:
    if not others:
        return item
    repeats = [each.row for each in (item, *others)]
    if judged and (failed := next((row for row in repeats if row.status == "failed"), None)):
        return replace(item, row=failed)
    rows = [row for row in repeats if row.status == "ok"]
    if len(rows) < 2:
        return replace(item, row=rows[0]) if rows else item
    return replace(item, row=_median_row(rows))


def _median_row(rows: Sequence[Row]) -> Row:
    values = [row.value for row in rows if row.value is not None]
    bounds = [each for row in rows for each in (row.value, row.low, row.high) if each is not None]
    return replace(
        rows[0],
        value=median(values),
        low=min(bounds),
        high=max(bounds),
        n=sum(row.n or 1 for row in rows),
        details={**rows[0].details, "interval": f"all of {len(rows)} repeats", "repeats": values},
    )
