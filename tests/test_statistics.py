from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.statistics import (
    Estimate,
    design_effect,
    mean_of_sequences,
    means_by_position,
    perplexity,
    rate_of_sequences,
    ratio_of_perplexities,
    wilson,
)


def test_the_t_interval_is_scipys() -> None:
    from scipy import stats

    values = np.random.default_rng(0).gamma(0.5, size=(8, 50))
    means = values.mean(1)
    theirs = stats.t.interval(0.95, 7, loc=means.mean(), scale=stats.sem(means))
    ours = mean_of_sequences(values)
    assert (ours.low, ours.high) == pytest.approx(theirs)
    assert ours.value == pytest.approx(values.mean())


@given(hits=st.integers(0, 300), more=st.integers(0, 300))
def test_wilson_is_scipys(hits: int, more: int) -> None:
    from scipy import stats

    count = hits + more or 1
    theirs = stats.binomtest(min(hits, count), count).proportion_ci(0.95, method="wilson")
    low, high = wilson(min(hits, count) / count, count)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= low <= min(hits, count) / count <= high <= 1


def test_means_are_covered_although_tokens_are_correlated() -> None:
    """95 % of intervals hold the truth; those that count tokens as independent hold it far less often."""
    rng = np.random.default_rng(1)
    runs, sequences, tokens = 2000, 8, 64
    values = rng.normal(size=(runs, sequences, 1)) + rng.normal(size=(runs, sequences, tokens))
    covered = naive = 0
    for run in values:
        found = mean_of_sequences(run)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0 <= found.high
        naive += abs(run.mean()) <= 1.96 * run.std() / math.sqrt(run.size)
    assert covered / runs == pytest.approx(0.95, abs=0.015)
    assert naive / runs < 0.5


def test_rates_are_covered_although_tokens_are_correlated() -> None:
    rng = np.random.default_rng(2)
    runs, sequences, tokens = 2000, 16, 64
    chance = rng.beta(16, 4, size=(runs, sequences, 1))  # mean 0.8, differing by sequence
    covered = naive = 0
    for hits in rng.random((runs, sequences, tokens)) < chance:
        found = rate_of_sequences(hits)
        covered += found.low <= 0.8 <= found.high  # type: ignore[operator]
        low, high = wilson(float(hits.mean()), hits.size)
        naive += low <= 0.8 <= high
    assert 0.91 < covered / runs < 0.975
    assert naive < covered - 0.1 * runs


def test_independent_tokens_cost_little() -> None:
    hits = np.random.default_rng(3).random((200, 100)) < 0.7
    assert 1 <= design_effect(hits) < 1.3
    assert design_effect(np.ones((4, 10), dtype=bool)) == 1
    assert design_effect(hits[:1]) == 1


def test_pairing_cancels_the_texts_difficulty() -> None:
    rng = np.random.default_rng(4)
    base = rng.gamma(2.0, size=(8, 1)) * rng.gamma(2.0, size=(8, 100))
    ratio = ratio_of_perplexities(base + math.log(1.1), base)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.1, 1.1, 1.1))
    assert perplexity(np.full((2, 3), math.log(7.0))) == pytest.approx(7)


@pytest.mark.parametrize(("tokens", "stretches"), [(255, 16), (16, 16), (5, 5), (1, 1)])
def test_stretches_cover_every_position_once(tokens: int, stretches: int) -> None:
    values = np.random.default_rng(5).gamma(0.1, size=(3, tokens))
    found = means_by_position(values)
    assert len(found) == stretches
    covered = [position for part in found for position in range(part.first, part.last + 1)]
    assert covered == list(range(1, tokens + 1))
    assert sum(part.n * part.mean.value for part in found) == pytest.approx(values.sum())
    for part in found:
        assert 0 <= part.mean.low <= part.mean.value <= part.mean.high
        assert part.mean.value == pytest.approx(values[:, part.first - 1 : part.last].mean())


def test_values_that_are_not_finite_are_null_in_json() -> None:
    values = np.ones((3, 4))
    values[1, 2] = np.nan
    found = mean_of_sequences(values)
    assert math.isnan(found.value)
    assert found.to_json() == {"value": None, "low": None, "high": None}
    assert perplexity(np.full((1, 1), 1e4)) == math.inf
    assert Estimate(1.0, None, None).to_json() == {"value": 1.0, "low": None, "high": None}
