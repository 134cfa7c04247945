from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.comparison import BANDS, LEAST_TOKENS, judge_check

ORDER = [word for word, *_ in BANDS] + ["broken"]


@pytest.mark.parametrize(
    ("kl", "same_top", "word"),
    [
        (0.00136, 0.977, "excellent"),  # llama.cpp, Llama-3-8B: q8_0
        (0.0055, 0.960, "excellent"),  # q6_K
        (0.031, 0.919, "good"),  # q4_K_M
        (0.04, 0.89, "fair"),  # one figure reaches the band, the other does not
        (0.15, 0.82, "fair"),  # a 135M model at Int4
        (0.4, 0.8, "poor"),
        (1.9, 0.31, "poor"),
        (2.1, 0.9, "broken"),
        (0.5, 0.29, "broken"),
        (math.nan, 1.0, "broken"),
        (math.inf, 1.0, "broken"),
    ],
)
def test_bands(kl: float, same_top: float, word: str) -> None:
    assert judge_check(kl, same_top, 4).word == word


@given(kl=st.floats(0, 5), same=st.floats(0, 1), worse=st.floats(0, 1), less=st.floats(0, 1))
def test_worse_figures_never_get_a_better_word(kl: float, same: float, worse: float, less: float) -> None:
    better, other = judge_check(kl, same, 4), judge_check(kl + worse, same * less, 4)
    assert ORDER.index(other.word) >= ORDER.index(better.word)


def test_of_too_little_text_only_a_broken_model_is_recognised() -> None:
    found = judge_check(0.15, 0.82, 4, LEAST_TOKENS - 1)
    assert str(found) == (
        "none: KL 0.1500 nats, same top token 82.0%; 249 tokens are too few to judge by, 250 the least"
    )
    assert judge_check(0.15, 0.82, 4, LEAST_TOKENS).word == "fair"
    assert judge_check(2.1, 0.9, 4, 31).word == "broken"
    assert judge_check(0.5, 0.29, 4, 31).word == "broken"
    assert judge_check(math.nan, 0.2, 4, 31).word == "broken"


def test_sentences_name_the_figures() -> None:
    assert (
        "0.1500 nats" in judge_check(0.15, 0.82, 4).sentence
        and "82.0%" in judge_check(0.15, 0.82, 4).sentence
    )
    assert "not finite" in judge_check(math.nan, 0.5, 4).sentence
    assert str(judge_check(0.001, 0.99, 8)).startswith("excellent: KL 0.0010")
    assert "Int8 usually" in judge_check(0.03, 0.95, 8).sentence
    assert "Int8" not in judge_check(0.001, 0.99, 8).sentence
