"""How sure an accuracy is: standard error and 95 % interval.

* Items that count alike: Wilson's interval (JASA 1927).
* Subjects that count alike (C-Eval's macro average): a bootstrap of the items within each subject. From a
  subject of n items, n - 1 are drawn, which makes the resampled variance unbiased (Rao and Wu, JASA 1988);
  drawing n would make the interval too narrow, as subjects have few items.
"""

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
        low, high: 95 % interval; None where a single item of a subject says nothing of its spread.
        n: items.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None
    n: int


def micro_accuracy(correct: Sequence[bool]) -> Accuracy:
    """Of items that count alike; at least one."""
    n = len(correct)
    value = sum(correct) / n
    low, high = wilson(value, n)
    return Accuracy(value, math.sqrt(value * (1 - value) / n), low, high, n)


def macro_accuracy(correct: Sequence[bool], subjects: Sequence[str | None], seed: int = SEED) -> Accuracy:
    """Of subjects that count alike.

    Where all items of every subject agree, resampling sees no spread at all: the interval is then Wilson's,
    of all items.
    """
    names = sorted(set(subjects), key=str)
    row_of = {name: row for row, name in enumerate(names)}
    place = np.array([row_of[subject] for subject in subjects])
    sizes = np.bincount(place)  # [subjects]
    shares = np.bincount(place, weights=np.array(correct, dtype=np.float64)) / sizes
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
