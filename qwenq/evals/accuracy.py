"""Estimate accuracies with their standard errors and 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenq.evals.statistics import CONFIDENCE, wilson

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Accuracy:
    """A share of correct items, 0 … 1.

    Attributes:
        error: standard error.
        low, high: 95 % interval; None where a subject has a single item, hence no spread.
        n: items.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None
    n: int


def micro_accuracy(correct: Sequence[bool]) -> Accuracy:
    """Return the share of correct items, with Wilson's interval (JASA 1927); at least one item is needed."""
    n = len(correct)
    value = sum(correct) / n
    low, high = wilson(value, n)
    return Accuracy(value, math.sqrt(value * (1 - value) / n), low, high, n)


def macro_accuracy(correct: Sequence[bool], subjects: Sequence[str | None], seed: int = SEED) -> Accuracy:
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
    draws = np.random.default_rng(seed).binomial(sizes - 1, shares, size=(RESAMPLES, len(sizes)))
    means = (draws / (sizes - 1)).mean(axis=1)  # [resamples]
    error = float(means.std(ddof=1))
    if error == 0:
        low, high = wilson(value, n)
    else:
        low, high = (float(q) for q in np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return Accuracy(value, error, low, high, n)
