"""Final answers of mathematics are found, and compared by what they say, not by how they are typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.evals.tasks.math import boxed, normal, number, same_answer, stated


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{5}$.", "5"),
        (r"$\boxed{1}$ or rather $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\fbox{A} it is", "A"),
        (r"$\boxed 7$ is it", "7"),
        (r"\boxed{\left\{1, \sqrt{2}\right\}}", r"\left\{1, \sqrt{2}\right\}"),
        (r"\boxed{never closed", None),
        ("no box", None),
        ("", None),
    ],
)
def test_boxed_returns_the_last_box(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Final Answer: The final answer is $5$. I hope it is correct.", "$5$"),
        ("The final answer is $0.5$. ", "$0.5$"),
        ("the final answer is: 12\nProblem", "12"),
        ("Final Answer: The final answer is $x.y$", "$x.y$"),
        ("The answer is 5", None),
    ],
)
def test_stated_returns_the_final_answer(text: str, answer: str | None) -> None:
    assert stated(text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac{1}2", "1/2"),
        (r"-\frac{2}{3}", "-2/3"),
        (r"2\frac{1}{2}", "2.5"),
        ("$1,234$", "1234"),
        (r"10,\!000", "10000"),
        ("1{,}000{,}000", "1000000"),
        ("5.", "5"),
        ("5.00", "5"),
        (".5", "0.5"),
        ("007", "7"),
        (r"\$20.50", "20.5"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"12\text{ cm}^2", "12"),
        (r"\text{Monday}", "Monday"),
        ("x = 5", "5"),
        (r"x \in [2,5)", "[2,5)"),
        (r"f(x)=2x", "2x"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"(1, \frac12)", "(1,0.5)"),
        (r"1,\ 2", "1,2"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\boxed{4}", "4"),
        (r"\(17\)", "17"),
        (r"\{1,2\}", r"\left\{1, 2\right\}"),
    ],
)
def test_the_same_answer_written_differently(one: str, other: str) -> None:
    assert same_answer(one, other) and same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "-5"),
        ("5", "50"),
        ("5", ""),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("1,2", "12"),
        ("1,234", "(1,234)"),
        ("x+1", "1+x"),  # no algebra is done
        (r"\frac{1}{0}", "0"),
        ("0.3333", r"\frac{1}{3}"),
        ("A", "B"),
        (r"\text{cm}", r"\text{m}"),
        ("²", "2"),
        ("9" * 300, "9" * 301),
    ],
)
def test_different_answers(one: str, other: str) -> None:
    assert not same_answer(one, other) and not same_answer(other, one)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_has_a_normal_form_and_equals_itself(text: str, other: str) -> None:
    assert same_answer(text, text)
    assert same_answer(text, other) == same_answer(other, text)


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_fractions_have_their_value(above: int, below: int) -> None:
    found = number(normal(rf"\dfrac{{{above}}}{{{below}}}"))
    assert found is not None and found * below == above
