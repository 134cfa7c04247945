"""What goes between the two processes of a program arrives as it was, and nothing else arrives."""

from __future__ import annotations

import math
import os
import socket
from collections import Counter, namedtuple
from collections.abc import Iterator

import pytest

from qwenq.evals.sandbox.inside import wire

VALUES = [
    None, True, False, 0, -1, 2**64, -(10**5000), 0.1, -0.0, math.inf, 1e-320, "", "\ud800", "é\n",
    b"\x00\xff", bytearray(b"x"), [], [1, [2.0, "3"]], (), (1, (2,)), {}, {1: [2], (3, "4"): {5}},
    set(), {1, "2"},
    frozenset({(1,)}), 1 + 2j, complex(math.inf, -1), range(3, 9, 2), [True, 1, 1.0],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_values_arrive(value: object, pair: tuple[int, int]) -> None:
    wire.send(pair[0], {"value": wire.encode(value)})
    found = wire.decode(wire.receive(pair[1])["value"])
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, float | list):
        assert repr(found) == repr(value)  # -0.0 is not 0.0 here, nor True 1


def test_not_a_number_arrives() -> None:
    assert math.isnan(wire.decode(wire.encode(math.nan)))


def test_of_a_subclass_the_plain_part_arrives() -> None:
    assert wire.decode(wire.encode(Counter("aab"))) == {"a": 2, "b": 1}
    assert wire.decode(wire.encode(namedtuple("Point", "x y")(1, 2))) == (1, 2)


@pytest.mark.parametrize("value", [object(), iter([1]), lambda: 1, [object()], {"a": math}])
def test_objects_are_not_encoded(value: object) -> None:
    with pytest.raises(TypeError, match="not a plain value"):
        wire.encode(value)


NONSENSE = [
    {}, {"a": 1, "b": 2}, {"eval": "1"}, {"int": "x"}, {"set": [[]]}, {"range": [1, 2, 0]}, {"dict": 3},
    {"bytes": 1},    {"complex": ["a"]}, {"float": []},
]  # fmt: skip
NO_MESSAGES = [
    b"", b"\x00", b"\xff" * 9, b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x03{}", b"\x00\x00\x00\x02{x",
    b"\x00\x01\x00\x00" + b"[" * 65536,
]  # fmt: skip


@pytest.mark.parametrize("content", NONSENSE)
def test_invalid_values_are_refused(content: object) -> None:
    with pytest.raises(wire.Broken):
        wire.decode(content)


@pytest.mark.parametrize("data", NO_MESSAGES, ids=range(len(NO_MESSAGES)))
def test_an_invalid_message_is_refused(data: bytes, pair: tuple[int, int]) -> None:
    os.write(pair[0], data)
    os.close(os.dup(pair[0]))
    socket.socket(fileno=os.dup(pair[0])).shutdown(socket.SHUT_WR)
    with pytest.raises(wire.Broken):
        wire.receive(pair[1])


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    one, other = socket.socketpair()
    with one, other:
        yield one.fileno(), other.fileno()
