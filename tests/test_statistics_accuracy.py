from __future__ import annotations

import math

import numpy as np
import pytest

from qwenq.statistics import macro_accuracy, micro_accuracy


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
