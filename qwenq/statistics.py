"""Estimate figures with their intervals, and test paired verdicts: numbers in, numbers out."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Estimate figures of tokens in sequences.
#
# Tokens of one sequence share its topic, so they are not independent draws; sequences are the unit.


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; the bounds are None where one sequence alone cannot give any."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """Return plain numbers; None where a number is not finite, which JSON cannot hold."""
        return {name: json_number(value) for name, value in vars(self).items()}

    def within(self, least: float, most: float = math.inf) -> Estimate:
        """Return it with bounds that are in the figure's range."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(least, self.low), high=min(self.high, most))


def json_number(value: float | None) -> float | None:
    """Return the number, or None for NaN, infinity and None."""
    return float(value) if value is not None and math.isfinite(value) else None


_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.", re.ASCII)


def mean_over_modules(errors: Iterable[tuple[str, float]]) -> float:
    """Return the mean error of modules by name; experts of a block count together, as one of each linear.

    Else hundreds of experts would hide what its attention has lost.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for name, error in errors:
        found[_OF_AN_EXPERT.sub(".experts.", name)].append(error)
    means = [sum(alike) / len(alike) for alike in found.values()]
    return sum(means) / max(1, len(means))


def mean_of_sequences(values: NDArray[np.float64]) -> Estimate:
    """Return the mean of [sequences, tokens] with Student's t interval over the sequences' means.

    The interval is exact for normal means at any n; a bootstrap of a few sequences is too narrow.
    """
    from scipy.special import stdtrit  # here, as `qwenq compare` needs no scipy

    with np.errstate(invalid="ignore", over="ignore"):
        means = values.mean(axis=1)  # [sequences]
        mean, count = float(means.mean()), len(means)
        if count < 2:
            return Estimate(mean, None, None)
        quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
        half = quantile * float(means.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


@dataclass(frozen=True)
class PositionMean:
    """Mean over a range of positions of every sequence."""

    # first, last: numbers of tokens before the first and the last prediction
    first: int
    last: int
    mean: Estimate  # with its interval over sequences
    n: int  # predictions

    def to_json(self) -> dict[str, float | None]:
        """Return plain numbers."""
        return {"first": self.first, "last": self.last, "n": self.n, **self.mean.to_json()}


STRETCHES = 16


def means_by_position(values: NDArray[np.float64]) -> tuple[PositionMean, ...]:
    """Return means of [sequences, tokens] over at most ``STRETCHES`` ranges of equal length along the tokens.

    The figure is never below zero; nor are the intervals' bounds.
    """
    sequences, tokens = values.shape
    count = min(STRETCHES, tokens)
    edges = [round(n * tokens / count) for n in range(count + 1)]
    made = []
    for start, end in pairwise(edges):
        mean = mean_of_sequences(values[:, start:end]).within(0.0)
        made.append(PositionMean(start + 1, end, mean, sequences * (end - start)))
    return tuple(made)


def ratio_of_perplexities(nll: NDArray[np.float64], base_nll: NDArray[np.float64]) -> Estimate:
    """Return exp(mean(nll − base_nll)) of [sequences, tokens] in nats, paired by token."""
    log_ratio = mean_of_sequences(nll - base_nll)
    bounds = (None if x is None else _exp(x) for x in (log_ratio.low, log_ratio.high))
    return Estimate(_exp(log_ratio.value), *bounds)


def perplexity(nll: NDArray[np.float64]) -> float:
    """Return exp of the mean of nats."""
    return _exp(float(nll.mean()))


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def rate_of_sequences(hits: NDArray[np.bool_]) -> Estimate:
    """Return the share of hits in [sequences, tokens] with Wilson's interval.

    The number of tokens is divided by the design effect (Kish 1965).
    """
    rate = float(hits.mean())
    low, high = wilson(rate, hits.size / design_effect(hits))
    return Estimate(rate, low, high)


def design_effect(hits: NDArray[np.bool_]) -> float:
    """Return the variance of the sequences' rates over that of independent tokens; at least 1."""
    sequences, tokens = hits.shape
    rate = float(hits.mean())
    independent: float = rate * (1 - rate) / tokens
    if sequences < 2 or independent == 0:
        return 1.0
    return max(1.0, float(hits.mean(axis=1).var(ddof=1)) / independent)


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Return Wilson's score interval of a share ``rate`` of ``count`` draws."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    # at 0 and 1 the bound is the rate itself, but for rounding
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Accuracy:
    """A share of correct items, 0 … 1."""

    value: float
    error: float | None  # standard error
    # low, high: 95 % interval; None where a subject has a single item, hence no spread
    low: float | None
    high: float | None
    n: int  # items


def micro_accuracy(correct: Sequence[bool]) -> Accuracy:
    """Return the share of correct items, with Wilson's interval (JASA 1927); at least one item is needed."""
    n = len(correct)
    value = sum(correct) / n
    low, high = wilson(value, n)
    return Accuracy(value, math.sqrt(value * (1 - value) / n), low, high, n)


def macro_accuracy(correct: Sequence[bool], subjects: Sequence[str | None]) -> Accuracy:
    """Return the mean of the subjects' shares, with an interval from a bootstrap within subjects.

    From a subject of n items, n - 1 are drawn, which makes the resampled variance unbiased (Rao and Wu, JASA
    1988); drawing n would make the interval too narrow, as subjects have few items. Where all items of every
    subject agree, resampling shows no spread: the interval is then Wilson's, of all items.
    """
    names = sorted(set(subjects), key=str)
    row_of = {name: row for row, name in enumerate(names)}
    index = np.array([row_of[subject] for subject in subjects])
    sizes = np.bincount(index)  # [subjects]
    shares = np.bincount(index, weights=np.array(correct, dtype=np.float64)) / sizes
    value, n = float(shares.mean()), len(correct)
    if sizes.min() < 2:
        return Accuracy(value, None, None, None, n)
    draws = np.random.default_rng(SEED).binomial(sizes - 1, shares, size=(RESAMPLES, len(sizes)))
    means = (draws / (sizes - 1)).mean(axis=1)  # [resamples]
    error = float(means.std(ddof=1))
    if error == 0:
        low, high = wilson(value, n)
    else:
        low, high = (float(q) for q in np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return Accuracy(value, error, low, high, n)


# Estimate the median of repeated measurements.
#
# From six values on its interval lies between two order statistics (distribution-free, by the binomial with
# p = 1/2; Conover, Practical Nonparametric Statistics, 3.2). Fewer values cannot give 95 % that way: then
# it is Student's t interval of the logarithms, which is wide, as it should be. A single value has no
# interval.


ORDER, STUDENT = "order statistics", "Student's t of the logarithms"
_T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t with n - 1 degrees of freedom, by n."""
NARROW = 0.01
"""Relative half-width of an interval that needs no more repetitions."""
LEAST, MOST = 6, 30
"""Repetitions: from LEAST on the interval needs no assumption; none after MOST."""
_FENCE = 3.0
"""Scaled median absolute deviations from the median beyond which a value is an outlier."""


@dataclass(frozen=True)
class Summary:
    """A median of repeated measurements."""

    median: float
    # low, high: 95 % interval of the median; None for a single value
    low: float | None
    high: float | None
    n: int
    method: str | None  # how the interval was made
    outliers: tuple[tuple[int, float], ...]  # (index, value), in the order measured; named, not removed

    @property
    def spread(self) -> float:
        """Return half the interval, relative to the median; infinite where there is no interval."""
        if self.low is None or self.high is None:
            return math.inf
        return (self.high - self.low) / 2 / abs(self.median)

    def details(self) -> dict[str, Any]:
        """Return the method and the outliers, for ``Row.details``."""
        found: dict[str, Any] = {"interval": self.method} if self.method else {}
        if self.outliers:
            found["outliers"] = [{"repetition": i, "value": value} for i, value in self.outliers]
        return found


def summarise(values: Sequence[float]) -> Summary:
    """Return the median of positive values with its interval."""
    if not values or min(values) <= 0:
        raise ValueError("a median needs at least one value, and all of them positive")
    middle, n = statistics.median(values), len(values)
    low, high, method = _interval(sorted(values), middle)
    return Summary(middle, low, high, n, method, _outliers(values, middle))


def _interval(ordered: list[float], middle: float) -> tuple[float | None, float | None, str | None]:
    n = len(ordered)
    if n == 1:
        return None, None, None
    if n in _T975:
        logs = [math.log(value) for value in ordered]
        half = _T975[n] * statistics.stdev(logs) / math.sqrt(n)
        mean = statistics.fmean(logs)
        return min(middle, math.exp(mean - half)), max(middle, math.exp(mean + half)), STUDENT
    below = rank(n)
    return ordered[below - 1], ordered[n - below], ORDER


def rank(n: int) -> int:
    """Return the largest r with P(r-th smallest ≤ median ≤ r-th largest) ≥ 0.95 of n ≥ 6 values, from 1."""
    tail, r = 0.0, 0
    while True:
        tail += math.comb(n, r) * 0.5**n  # P(at most r values lie below the median)
        if tail > 0.025:
            return r
        r += 1


def _outliers(values: Sequence[float], middle: float) -> tuple[tuple[int, float], ...]:
    """Return values beyond three deviations (1.4826 times the median absolute one, as for a normal)."""
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    if deviation == 0:
        return ()
    return tuple((i, v) for i, v in enumerate(values) if abs(v - middle) > _FENCE * deviation)


def repeat(once: Callable[[], float], patience: float) -> list[float]:
    """Call ``once`` until its interval is narrow or ``patience`` seconds are over; at least once."""
    values: list[float] = []
    began = time.monotonic()
    while True:
        values.append(once())
        if len(values) >= MOST or enough(values, time.monotonic() - began, patience):
            return values


def enough(values: Sequence[float], taken: float, patience: float) -> bool:
    """Tell whether the interval is narrow, or another repetition would exceed ``patience`` seconds."""
    if taken + taken / len(values) > patience:
        return True
    return len(values) >= LEAST and summarise(values).spread <= NARROW


# Test paired verdicts: McNemar's exact test (Psychometrika 1947), corrected by Holm.
#
# Questions that both models answer alike carry no information about which is better. Under the null
# hypothesis each of the others is as likely a loss as a win, so p is binomial.


ALPHA = 0.05


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p of ``lost`` against ``won`` discordant pairs; 1 without any."""
    discordant, tail, ways = lost + won, 0, 1
    for k in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (discordant - k) // (k + 1)  # discordant over k + 1
    return min(1.0, float(Fraction(2 * tail, 2**discordant)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm (Scandinavian Journal of Statistics 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def format_p(p: float) -> str:
    """Format a p value for a table: ``0.031``, ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_phrase(p: float) -> str:
    """Format a p value for a sentence: ``p = 0.031``, ``p < 0.001``."""
    shown = format_p(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"


# Bound a change of accuracy, and test for equivalence.
#
# The interval and the tests are Tango's score test for the difference of two paired shares (Statistics in
# Medicine 17, 1998, 891-908): it compares the difference with any value, not with zero alone, and holds
# where few items or none differ, where an interval of ± 1.96 standard errors would have no width.
#
# Equivalence is two one-sided tests (TOST; Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics
# 1987): that the drop is below the margin, and that the gain is, each at 5 %.


MARGIN = 0.02
"""Drop of accuracy, as a share of all items, from which a loss matters here."""
_STEPS = 50  # bisection: far below any digit that is shown


def statistic(lost: int, won: int, n: int, change: float) -> float:
    """Return how many standard errors the measured change is above a hypothetical one.

    Args:
        lost, won: items that only the base, and only the model, got right.
        n: all items.
        change: the hypothesis, a share between -1 and 1, negative for a drop.
    """
    drop = -change
    # The share of items won that is likeliest where the shares lost and won differ by exactly this drop.
    b = -lost - won + (2 * n - lost + won) * drop
    c = -won * drop * (1 - drop)
    share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * share + drop * (1 - drop))
    above = won - lost - n * change
    if variance <= 1e-12 * n:
        return 0.0 if abs(above) < 1e-9 else math.copysign(math.inf, above)
    return above / math.sqrt(variance)


def change_interval(lost: int, won: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Tango's score interval of the change."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    measured = (won - lost) / n
    low = _crossing(lambda change: statistic(lost, won, n, change) > z, -1.0, measured)
    high = _crossing(lambda change: statistic(lost, won, n, change) >= -z, measured, 1.0)
    return low, high


def equivalence_p(lost: int, won: int, n: int) -> float:
    """Return the p value of TOST: below 0.05, both a drop and a gain of ``MARGIN`` are excluded."""
    above = statistic(lost, won, n, -MARGIN)
    below = statistic(lost, won, n, MARGIN)
    return max(NormalDist().cdf(-above), NormalDist().cdf(below))


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds at ``low`` ends on the way to ``high``."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


POWER = 0.8
_TAIL = 8.0  # standard deviations of the number of disagreements that are summed over


def detectable_drop(n: int, discordant: float) -> float | None:
    """Return the smallest drop in accuracy that McNemar's test (p < 0.05) finds with probability 0.8.

    The models disagree on the share ``discordant`` of the ``n`` items; where it is smaller than the drop,
    every disagreement counts as a loss.
    """
    if power(n, discordant, 1.0) < POWER:
        return None
    return _crossing(lambda drop: power(n, discordant, drop) < POWER, 0.0, 1.0)


def power(n: int, discordant: float, drop: float) -> float:
    """Return the probability that the test finds a drop of this size (p < 0.05, more lost than won).

    It is exact: a sum over the number of disagreements among n items, and of losses among these.
    """
    from scipy.special import bdtr  # here, as `qwenq compare` needs no scipy

    share = max(discordant, drop)
    if share == 0:
        return 0.0
    spread = _TAIL * math.sqrt(n * share * (1 - share)) + 1
    first, last = max(1, math.floor(n * share - spread)), min(n, math.ceil(n * share + spread))
    counts = np.arange(first, last + 1)  # items on which they disagree
    most = _most_wins(counts)
    found = np.where(most >= 0, bdtr(np.maximum(most, 0), counts, (share - drop) / (2 * share)), 0.0)
    return float((_binomial(counts, n, share) * found).sum())


def _most_wins(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the most wins among so many disagreements with which a loss is significant; -1 without any."""
    from scipy.special import bdtr, bdtrik

    most = np.floor(bdtrik(ALPHA / 2, counts, 0.5))
    most = np.where(np.isfinite(most), most, -1.0) + 1  # one too many at most, whatever was rounded
    for _ in range(3):
        significant = 2 * bdtr(np.maximum(most, 0), counts, 0.5) < ALPHA
        most = np.where((most >= 0) & ~significant, most - 1, most)
    return np.asarray(most)


def _binomial(counts: NDArray[np.int64], n: int, share: float) -> NDArray[np.float64]:
    """Return the probability of each count among n."""
    from scipy.special import gammaln

    if share >= 1:
        return np.asarray(counts == n, dtype=np.float64)
    logs = gammaln(n + 1) - gammaln(counts + 1) - gammaln(n - counts + 1)
    found: NDArray[np.float64] = np.exp(logs + counts * math.log(share) + (n - counts) * math.log1p(-share))
    return found
