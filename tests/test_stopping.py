"""SIGTERM is noted while something is finished, obeyed behind it, and never lost."""

from __future__ import annotations

import signal

import pytest

from qwenq import stopping
from qwenq.cli.app import _sigterm_as_ctrl_c
from qwenq.stopping import Terminated, asked, behind, finishing, note, passed_on, stop_here


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test moves; and no SIGTERM has come yet."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stopping, "_state", stopping._State())
    return now


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


def test_a_second_one_stops_at_once_unless_it_is_the_first_passed_on(clock: list[float]) -> None:
    with _sigterm_as_ctrl_c() as received:
        with pytest.raises(Terminated), finishing("all is done"):
            signal.raise_signal(signal.SIGTERM)
            clock[0] += 0.5
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # nor does it break into what is said at the end
        assert received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt), finishing("all is done"):
            clock[0] += 0.6
            signal.raise_signal(signal.SIGTERM)  # long after the other, and obeyed later
            assert asked()
            clock[0] += 1.1
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")


def test_outside_it_the_first_passed_on_breaks_into_nothing(clock: list[float]) -> None:
    """`qwenq run` and torchrun pass it on while the command says how to go on."""
    with _sigterm_as_ctrl_c() as received:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        clock[0] += 0.9
        assert passed_on()
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_what_goes_wrong_meanwhile_is_said() -> None:
    with pytest.raises(ValueError, match="disk"), finishing("all is done"):
        note()
        raise ValueError("disk")
    assert not asked()
    with finishing("the next"):
        stop_here()


def test_what_fails_while_a_stop_is_passing_is_the_stop() -> None:
    with pytest.raises(RuntimeError) as failed:
        try:
            raise Terminated
        finally:
            raise RuntimeError("trying to pop from empty mode stack")
    assert type(behind(failed.value)) is Terminated
    wrapped = ValueError("the file is damaged")
    wrapped.__cause__ = failed.value
    assert type(behind(wrapped)) is Terminated
    alone = ValueError("the file is damaged")
    alone.__cause__ = KeyError("a")
    alone.__cause__.__context__ = alone  # a circle has an end
    assert behind(alone) is None
