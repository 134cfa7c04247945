"""Which unquantised model a quantised one is compared with: by one rule, and evals and reports obey it."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from qwenq.comparison import BANDS, LEAST_TOKENS, PLAIN, Paired, choose_base, judge_check, pair_verdicts
from qwenq.evals.rows import base_row, point_of
from qwenq.reporting.collect import collect
from qwenq.reporting.losses import losses
from qwenq.results import Model, Row, append_row
from qwenq.statistics import ALPHA, POWER, detectable_drop, format_p, mcnemar, p_phrase, power


@pytest.mark.parametrize(
    ("measured", "dtype", "chosen"),
    [
        ("fp32 bf16 fp16 int8", "bfloat16", "bf16"),
        ("fp32 bf16 fp16 int8", "float16", "fp16"),
        ("fp32 bf16 fp16 int8", None, "fp32"),
        ("bf16 fp16", "float32", "bf16"),
        ("fp16 fp32", "bfloat16", "fp32"),
        ("int8 served", "bfloat16", None),
        ("bf16", ["bfloat16"], "bf16"),
    ],
)
def test_the_base_is_computed_alike_where_there_is_one(
    measured: str, dtype: object, chosen: str | None
) -> None:
    assert choose_base({precision: precision for precision in measured.split()}, dtype) == chosen


def plan_of(task: str) -> Any:
    return SimpleNamespace(
        task=SimpleNamespace(name=task, protocol="card", version=1),
        limit=None,
        shots=None,
        subjects=(),
        source=SimpleNamespace(sample=False),
        thinking=False,
        max_new_tokens=None,
    )


def row(precision: str, dtype: str) -> Row:
    model = Model("m", "sha256:quantised" if precision == "int4" else "sha256:plain", precision, "m")
    point = point_of(plan_of("mmlu"))
    return Row(
        "accuracy", model, point, 0.5, "share", settings={"dtype": dtype}, details={"items": {"a": True}}
    )


SETS = [chosen for size in range(len(PLAIN) + 1) for chosen in combinations(PLAIN, size)]


@pytest.mark.parametrize("dtype", PLAIN.values())
@pytest.mark.parametrize("measured", SETS, ids="+".join)
def test_evaluation_and_reports_choose_the_same_base(
    tmp_path: Path, measured: tuple[str, ...], dtype: str
) -> None:
    """Whatever was measured at this point; a row of another task is no base."""
    for precision in measured:
        append_row(tmp_path, row(precision, PLAIN[precision]))
    quantised = row("int4", dtype)
    contender: Any = SimpleNamespace(
        quantised=True, model=quantised.model, settings={"dtype": dtype}, base="sha256:plain"
    )
    append_row(tmp_path, quantised)
    evaluated = base_row(tmp_path, contender, plan_of("mmlu"))
    assert base_row(tmp_path, contender, plan_of("gsm8k")) is None
    reported = [loss.before.model.precision for loss in losses(collect([tmp_path]), "m")]
    expected = choose_base({precision: precision for precision in measured}, dtype)
    assert (evaluated.model.precision if evaluated else None) == expected
    assert reported == ([expected] if expected else [])


# Pair verdicts, and test them.


@given(lost=st.integers(0, 200), won=st.integers(0, 200))
def test_mcnemar_is_scipys_binomial_test(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_fourteen_thousand_items() -> None:
    assert 0 < mcnemar(7300, 6742) < 0.001


@pytest.mark.parametrize(
    ("n", "discordant", "drop"),
    [(164, 0.1, 0.05), (164, 0.02, 0.05), (40, 0.3, 0.2), (1000, 0.1, 0.03), (300, 0.05, 0.0)],
)
def test_power_is_what_a_simulation_finds(n: int, discordant: float, drop: float) -> None:
    rng, runs = np.random.default_rng(0), 20_000
    share = max(discordant, drop)
    chances = [(share + drop) / 2, (share - drop) / 2, 1 - share]
    lost, won, _ = rng.multinomial(n, chances, size=runs).T
    known: dict[tuple[int, int], float] = {}
    hits = 0
    for pair in zip(lost.tolist(), won.tolist(), strict=True):
        if pair not in known:
            known[pair] = mcnemar(*pair)
        hits += known[pair] < ALPHA and pair[0] > pair[1]
    assert power(n, discordant, drop) == pytest.approx(hits / runs, abs=0.012)


@pytest.mark.parametrize(
    ("n", "discordant"), [(164, 0.08), (164, 0.0), (1319, 0.1), (14_042, 0.06), (50, 0.4)]
)
def test_the_smallest_drop_is_found_four_times_in_five(n: int, discordant: float) -> None:
    drop = detectable_drop(n, discordant)
    assert drop is not None
    assert power(n, discordant, drop) >= POWER
    assert power(n, discordant, 0.97 * drop) < POWER + 0.02  # the test's steps make the power bump
    if n > 1000:  # there the normal approximation holds (Connor 1987)
        approximate = (1.96 * discordant**0.5 + 0.84 * (discordant - drop**2) ** 0.5) / n**0.5
        assert drop == pytest.approx(approximate, rel=0.1)


def test_no_disagreement_still_needs_six_losses() -> None:
    """With no win, 6 losses are significant and 5 are not."""
    assert mcnemar(5, 0) > ALPHA > mcnemar(6, 0)
    assert detectable_drop(5, 0.0) is None
    assert detectable_drop(6, 0.0) == pytest.approx(0.8 ** (1 / 6), abs=1e-6)


def test_more_items_show_smaller_drops() -> None:
    drops = [detectable_drop(n, 0.1) or 1 for n in (100, 400, 1600, 6400)]
    assert drops == sorted(drops, reverse=True)


def verdicts(*, lost: int, won: int, both: int) -> tuple[dict[str, bool], dict[str, bool]]:
    base = {f"l{i}": True for i in range(lost)} | {f"w{i}": False for i in range(won)}
    model = {f"l{i}": False for i in range(lost)} | {f"w{i}": True for i in range(won)}
    same = {f"b{i}": i % 2 == 0 for i in range(both)}
    return base | same, model | same


def test_items_are_paired_by_id() -> None:
    base, model = verdicts(lost=3, won=2, both=95)
    found = pair_verdicts(base, dict(reversed(model.items())))
    assert found == Paired(100, 3, 2)
    assert found.p == 1.0
    told = found.to_json(-0.02)
    assert (told["n"], told["lost"], told["won"], told["p"]) == (100, 3, 2, 1.0)
    assert (told["change"], told["detectable"]) == (-0.02, found.detectable)
    assert told["sentence"] == found.describe_change(-0.02)


def test_other_items_are_not_paired() -> None:
    """Not on those that both have, either: the scores are of all."""
    base, model = verdicts(lost=3, won=2, both=95)
    base["only here"] = True
    assert pair_verdicts(base, model) == "other items: 1 of 101 are in one of the two only"
    assert pair_verdicts({"a": True}, {"b": True}) == "other items: 2 of 2 are in one of the two only"
    assert isinstance(pair_verdicts({}, {}), str)


def test_equal_ids_of_other_questions_are_not_paired() -> None:
    base, model = verdicts(lost=3, won=2, both=95)
    changed = pair_verdicts(base, model, questions=("then", "now"))
    assert changed == "other questions under the same ids: the data has changed"
    for known in (("now", "now"), (None, "now"), ("then", None), (None, None)):
        assert isinstance(pair_verdicts(base, model, questions=known), Paired)


def test_a_p_value_is_written_one_way() -> None:
    assert [format_p(p) for p in (1.0, 0.0314, 0.001, 0.00099)] == ["1.000", "0.031", "0.001", "< 0.001"]
    assert [p_phrase(p) for p in (0.0314, 0.00099)] == ["p = 0.031", "p < 0.001"]


@pytest.mark.parametrize(
    ("lost", "won", "both", "sentence"),
    [
        (30, 5, 500, r"loss: −4\.7 points, 95 % interval −7\.\d to −2\.\d \(p < 0\.001\)"),
        (2, 14, 100, r"gain: \+10\.3 points, 95 % interval \+4\.\d to \+1\d\.\d \(p = 0\.004\)"),
        (
            12,
            10,
            1000,
            r"no loss beyond 2 points: −0\.2 points, 95 % interval −1\.\d to .* \(TOST, p < 0\.001\)",
        ),
        (
            12,
            10,
            300,
            r"inconclusive: −0\.6 points, 95 % .*; a drop below \d\.\d points would go unseen",
        ),
        (
            0,
            0,
            4,
            r"inconclusive: 0\.0 points, 95 % .*; with 4 items no loss at all could be shown",
        ),
    ],
)
def test_a_comparison_is_described_in_one_sentence(lost: int, won: int, both: int, sentence: str) -> None:
    import re

    found = pair_verdicts(*verdicts(lost=lost, won=won, both=both))
    assert isinstance(found, Paired)
    said = found.describe_change((won - lost) / found.n)
    assert re.fullmatch(sentence, said), said


@pytest.mark.parametrize(
    ("lost", "won", "change", "sentence"),
    [
        (40, 15, 0.003, "loss: +0.3 points; all items alike −5.0, 95 % interval "),
        (15, 40, -0.003, "gain: −0.3 points; all items alike +5.0, 95 % interval "),
        (40, 15, 0.0, "loss: 0.0 points; all items alike −5.0, 95 % interval "),
        (40, 15, -0.05, "loss: −5.0 points, 95 % interval "),
    ],
)
def test_items_are_given_too_where_the_score_went_another_way(
    lost: int, won: int, change: float, sentence: str
) -> None:
    """Scores may count subjects alike; what is tested is items."""
    said = Paired(500, lost, won).describe_change(change)
    assert said.startswith(sentence)
    assert said.endswith(" (p = 0.001)")


# The verdict on a check.


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
