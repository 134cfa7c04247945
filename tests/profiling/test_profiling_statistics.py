"""Medians and their intervals, beside the binomial itself and by coverage."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binom, t

from qwenq.statistics import ORDER, STUDENT, enough, rank, repeat, summarise


@pytest.mark.parametrize("n", range(6, 60))
def test_the_rank_is_the_narrowest_with_its_confidence(n: int) -> None:
    def confidence(r: int) -> float:
        """P(the median lies between the r-th smallest and the r-th largest)."""
        return 1 - 2 * float(binom.cdf(r - 1, n, 0.5))

    assert confidence(rank(n)) >= 0.95
    assert confidence(rank(n) + 1) < 0.95


def test_one_value_has_no_interval() -> None:
    assert summarise([3.0]).low is None
    assert summarise([3.0]).spread == float("inf")


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_values_have_a_wide_one(n: int) -> None:
    values = [10.0, 11.0, 12.0, 10.5, 11.5][:n]
    summary = summarise(values)
    assert summary.method == STUDENT
    assert summary.low < min(values) or n > 3
    assert summary.low <= summary.median <= summary.high
    if n == 2:  # by hand: mean of two logarithms ± t · s / √2
        import math

        logs = [math.log(v) for v in values]
        half = float(t.ppf(0.975, 1)) * abs(logs[1] - logs[0]) / 2
        assert summary.high == pytest.approx(math.exp(sum(logs) / 2 + half), rel=1e-3)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    covered = 0
    for _ in range(2000):
        summary = summarise([draw.lognormvariate(0, 1) for _ in range(9)])  # its median is 1
        assert summary.method == ORDER
        covered += summary.low <= 1 <= summary.high
    assert 0.94 < covered / 2000 < 0.98


def test_outliers_are_named_and_kept() -> None:
    values = [10.0, 10.1, 9.9, 10.05, 30.0, 9.95]
    summary = summarise(values)
    assert summary.outliers == ((4, 30.0),)
    assert summary.high == 30.0
    assert summary.details()["outliers"] == [{"repetition": 4, "value": 30.0}]
    assert summarise([5.0] * 8).outliers == ()


def test_no_values_or_none_positive_are_refused() -> None:
    for values in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="median"):
            summarise(values)


def test_repetition_ends_when_it_is_narrow_and_not_before() -> None:
    assert repeat(lambda: 1.0, patience=60) == [1.0] * 6
    scattered = iter(range(1, 100))
    assert len(repeat(lambda: float(next(scattered)), patience=60)) == 30


def test_repetition_ends_with_the_patience_but_happens_once() -> None:
    assert repeat(lambda: 1.0, patience=0) == [1.0]
    assert enough([1.0, 2.0], taken=10, patience=12)
    assert not enough([1.0, 2.0], taken=10, patience=16)
