from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq, minimize_scalar

from qwenq.comparison import Paired, TaskComparison, headline
from qwenq.statistics import (
    MARGIN,
    Estimate,
    change_interval,
    design_effect,
    equivalence_p,
    macro_accuracy,
    mean_of_sequences,
    mean_over_modules,
    means_by_position,
    micro_accuracy,
    perplexity,
    rate_of_sequences,
    ratio_of_perplexities,
    statistic,
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


def test_experts_of_a_block_count_together_in_a_mean_over_modules() -> None:
    attention = [(f"model.layers.{layer}.self_attn.o_proj", 0.3) for layer in range(2)]
    experts = [(f"model.layers.{layer}.mlp.experts.{n}.up_proj", 0.1) for layer in range(2) for n in range(9)]
    assert mean_over_modules(attention) == pytest.approx(0.3)
    assert mean_over_modules([*attention, *experts]) == pytest.approx(0.2)
    assert mean_over_modules([]) == 0


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


# Accuracies.


def test_micro_is_scipys_wilson() -> None:
    from scipy import stats

    correct = [True] * 43 + [False] * 121
    found = micro_accuracy(correct)
    theirs = stats.binomtest(43, 164).proportion_ci(0.95, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((43 / 164, theirs.low, theirs.high))
    assert found.error == pytest.approx(math.sqrt(43 / 164 * 121 / 164 / 164))


def test_the_standard_error_of_humaneval() -> None:
    """A standard error of 3.4 points on 164 items."""
    assert 100 * (micro_accuracy([True] * 43 + [False] * 121).error or 0) == pytest.approx(3.4, abs=0.05)


def test_macro_is_the_mean_of_subjects() -> None:
    correct = [True, True, True, False, True, False]
    found = macro_accuracy(correct, ["a", "a", "a", "a", "b", "b"])
    assert found.value == pytest.approx((0.75 + 0.5) / 2)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert found == macro_accuracy(correct, ["a", "a", "a", "a", "b", "b"])  # seeded


def test_macro_errors_are_unbiased_and_intervals_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """52 subjects of 11 to 30 items, as C-Eval's: 95 % of intervals hold the truth."""
    monkeypatch.setattr("qwenq.statistics.RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    sizes = rng.integers(11, 31, size=52)
    rates = rng.beta(4, 3, size=52)
    subjects = [str(place) for place, size in enumerate(sizes) for _ in range(size)]
    truth, errors, values, covered, runs = rates.mean(), [], [], 0, 200
    for _ in range(runs):
        correct = [
            bool(hit) for size, rate in zip(sizes, rates, strict=True) for hit in rng.random(size) < rate
        ]
        found = macro_accuracy(correct, subjects)
        assert found.low is not None and found.high is not None and found.error is not None
        covered += found.low <= truth <= found.high
        errors.append(found.error)
        values.append(found.value)
    assert covered / runs > 0.9
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_a_subject_of_one_item_has_no_interval() -> None:
    assert macro_accuracy([True, False, True], ["a", "a", "b"]).low is None


def test_all_correct_still_has_an_interval() -> None:
    found = macro_accuracy([True] * 20, ["a", "b"] * 10)
    assert found.high == 1
    assert found.low is not None
    assert 0.8 < found.low < 0.9


# Intervals and equivalence of paired shares, against a likelihood maximised by scipy and its t tests.


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
