"""Axes: round ticks, within, for any figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.reporting.scale import Axis, bounds, tick_text

figures = st.lists(st.floats(-1e18, 1e18), min_size=1, max_size=6)
positive = st.lists(st.floats(1e-300, 1e18), min_size=1, max_size=6)


@given(figures, st.booleans())
def test_an_axis_holds_its_figures_and_a_few_ticks(values: list[float], zero: bool) -> None:
    low, high = bounds(values, zero=zero)
    axis = Axis(low, high, 0, 100)
    assert all(-1e-6 <= axis(value) <= 100 + 1e-6 for value in values)
    assert len(axis.ticks()) <= 12
    assert all(-1e-6 <= axis(tick) <= 100 + 1e-6 for tick in axis.ticks())


@given(positive)
def test_a_logarithmic_axis_too(values: list[float]) -> None:
    low, high = bounds(values, zero=False, log=True)
    axis = Axis(low, high, 100, 0, log=True)
    places = [axis(value) for value in values] + [axis(tick) for tick in axis.ticks()]
    assert all(math.isfinite(place) and -1e-6 <= place <= 100 + 1e-6 for place in places)
    assert len(axis.ticks()) <= 20


def test_ticks_by_hand() -> None:
    assert Axis(0, 100, 0, 1).ticks() == [0, 20, 40, 60, 80, 100]
    assert Axis(-1, 1, 0, 1).ticks(4) == [-1, -0.5, 0, 0.5, 1]
    assert Axis(0.04, 3, 0, 1, log=True).ticks() == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (8192, "8192"), (20_000, "20,000"), (0.05, "0.05"), (1e-6, "1e-06"), (0.1 + 0.2, "0.3"),
])  # fmt: skip
def test_ticks_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text
