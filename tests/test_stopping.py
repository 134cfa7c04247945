"""SIGTERM is noted while something is finished, obeyed behind it, and never lost."""

from __future__ import annotations

import pytest

from qwenq import stopping
from qwenq.stopping import Terminated, asked, finishing, note, stop_here


def test_outside_it_stops_at_once() -> None:
    assert note() is None
    assert not asked()
    stop_here()


def test_it_is_obeyed_at_the_next_place_or_at_the_end() -> None:
    with pytest.raises(Terminated), finishing("all is done"):
        stop_here()
        assert note() == "all is done"
        assert asked()
        stop_here()
        pytest.fail("went on")
    reached = False
    with pytest.raises(Terminated), finishing("all is done"):
        note()
        reached = True
    assert reached
    assert not asked()  # it has been obeyed


def test_a_second_one_stops_at_once_unless_it_is_the_first_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with pytest.raises(Terminated), finishing("all is done"):
        assert note() == "all is done"
        clock[0] += 0.5
        assert note() == "all is done"
        clock[0] += 0.6
        assert note() is None


def test_what_goes_wrong_meanwhile_is_said() -> None:
    with pytest.raises(ValueError, match="disk"), finishing("all is done"):
        note()
        raise ValueError("disk")
    assert not asked()
    with finishing("the next"):
        stop_here()
