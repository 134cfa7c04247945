"""Intervals and equivalence of paired shares, against a likelihood maximised by scipy and its t tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq, minimize_scalar

from qwenq.comparison import Paired, TaskComparison, headline
from qwenq.statistics import MARGIN, change_interval, equivalence_p, statistic

CASES = [(22, 0, 500), (14, 2, 56), (3, 9, 124), (40, 38, 2000), (1, 1, 40), (0, 5, 90), (7, 0, 60)]


def by_likelihood(lost: int, won: int, n: int, change: float) -> float:
    """The score statistic from its definition: scipy finds the likeliest share of items won."""
    drop = -change

    def minus_log(share: float) -> float:
        shares = (share + drop, share, 1 - 2 * share - drop)
        return -sum(
            count * math.log(max(one, 1e-300))
            for count, one in zip((lost, won, n - lost - won), shares, strict=True)
            if count
        )

    bounds = (max(0.0, -drop), (1 - drop) / 2)
    found = minimize_scalar(minus_log, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    variance = n * (2 * found.x + drop - drop**2)
    return float((won - lost - n * change) / math.sqrt(variance))


@pytest.mark.parametrize(("lost", "won", "n"), CASES)
@pytest.mark.parametrize("change", [-0.2, -0.02, 0.02, 0.15])
def test_the_statistic_is_that_of_the_likelihood(lost: int, won: int, n: int, change: float) -> None:
    assert statistic(lost, won, n, change) == pytest.approx(by_likelihood(lost, won, n, change), rel=1e-3)


@pytest.mark.parametrize(("lost", "won", "n"), CASES)
def test_the_interval_ends_where_the_likelihood_rejects(lost: int, won: int, n: int) -> None:
    z, measured = stats.norm.ppf(0.975), (won - lost) / n
    low = brentq(lambda change: by_likelihood(lost, won, n, change) - z, -0.9, measured - 1e-9)
    high = brentq(lambda change: by_likelihood(lost, won, n, change) + z, measured + 1e-9, 0.9)
    assert change_interval(lost, won, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("lost", "won", "n"), [(400, 380, 14000), (90, 100, 9000), (300, 250, 5000)])
def test_tost_is_that_of_scipy_where_items_are_many(lost: int, won: int, n: int) -> None:
    changes = np.repeat([-1.0, 1.0, 0.0], [lost, won, n - lost - won])
    above = stats.ttest_1samp(changes, -MARGIN, alternative="greater").pvalue
    below = stats.ttest_1samp(changes, MARGIN, alternative="less").pvalue
    assert equivalence_p(lost, won, n) == pytest.approx(max(above, below), rel=0.15, abs=1e-6)


@settings(max_examples=200)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_tost_and_the_90_percent_interval_say_the_same(case: tuple[int, int, int]) -> None:
    n, lost, won = case[0], case[1], min(case[2], case[0] - case[1])
    low, high = change_interval(lost, won, n, 0.9)
    assert low <= (won - lost) / n + 1e-9
    assert high >= (won - lost) / n - 1e-9
    inside = low > -MARGIN and high < MARGIN
    if min(abs(low + MARGIN), abs(high - MARGIN)) > 1e-6:
        assert (equivalence_p(lost, won, n) < 0.05) == inside


def test_few_items_without_any_difference_prove_nothing() -> None:
    assert not Paired(40, 0, 0).equivalent
    assert Paired(40, 0, 0).describe_change(0.0).startswith("inconclusive")
    assert Paired(1000, 0, 0).describe_change(0.0).startswith("no loss beyond 2 points")


def test_the_headline_begins_with_the_largest_drop_and_is_inconclusive() -> None:
    """GSM8K of a small sample: p is below 0.05 alone, and above it after Holm's correction."""
    fell = TaskComparison("GSM8K", 31 / 56, 19 / 56, Paired(56, 17, 5), 0.083)
    rose = TaskComparison("MMLU", 0.556, 0.653, Paired(124, 12, 24), 0.4)
    said = headline([rose, fell], 8)
    assert said.startswith("GSM8K fell most: 55.4 → 33.9 % (−21.4 points, 95 % interval −")
    assert "0.083 after Holm's correction for 8 tests" in said
    assert "but not one of 2" in said
    assert said.endswith("verdict: inconclusive (TOST excludes a change of 2 points in 0 of 2 tasks)")
    assert "MMLU" not in said


def test_verdicts_of_the_headline() -> None:
    same = TaskComparison("A", 0.5, 0.5, Paired(5000, 20, 20), 1.0)
    lost = TaskComparison("B", 0.6, 0.4, Paired(100, 22, 2), 0.001)
    assert "verdict: no loss beyond 2 points in 1 task (TOST, p < 0.001)" in headline([same], 1)
    assert "verdict: a loss in 1 of 2 tasks (B)" in headline([same, lost], 2)
    assert "inconclusive" in headline([same], 1, unpaired=1)


def test_the_headline_also_names_a_significant_loss_in_another_task() -> None:
    """The largest drop may be chance, of few items, where a smaller one of many items is not."""
    fell = TaskComparison("HumanEval", 0.50, 0.40, Paired(40, 6, 2), 0.29)
    lost = TaskComparison("MMLU", 0.60, 0.55, Paired(2000, 140, 40), 0.001)
    text = headline([fell, lost], 2)
    assert text.startswith("HumanEval fell most: 50.0 → 40.0 % (−10.0 points")
    assert "MMLU is the largest significant loss: 60.0 → 55.0 % (−5.0 points, 95 % interval −" in text
    assert text.endswith("verdict: a loss in 1 of 2 tasks (MMLU)")
    assert "significant loss" not in headline([lost], 1)
