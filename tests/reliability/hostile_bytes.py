"""Strategies: sound files, damaged as a bad disk or a bad person would."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

DEEP = 100_000
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**63), 2**70, 10**400, 0.5, -0.0, 1e-320, 1e308,
    float("inf"), float("nan"), "", "x", "0", "é", "\ud800", "\x1b[2J\x07", "a" * 5000, "../../secret",
    "/etc/passwd", "C:\\x", "\0", "None", "torch.float32", [], {}, [[]], [None], [-1], [2**40], {"": ""},
    {"a": {"b": []}}, ["x"] * 1000, "{{ 7 * 7 }}", "__class__", "__import__('os').system('touch pwned')",
]  # fmt: skip
KEYS = ["", "_private", "__class__", "__metadata__", "auto_map", "type", "x" * 300, "\ud800", "model_type"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside a JSON value, itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in inner for found in ((*path, key), *places(child, (*path, key)))]


@st.composite
def damaged_tree(draw: DrawFn, sound: Any, values: list[Any] | None = None) -> Any:
    """The value with one to three places replaced, removed, doubled or added to."""
    tree = copy.deepcopy(sound)
    hostile = st.sampled_from(values or VALUES)
    for _ in range(draw(st.integers(1, 3))):
        paths = places(tree)
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "copy"]))
        if how == "replace":
            parent[path[-1]] = copy.deepcopy(draw(hostile))
        elif how == "remove":
            del parent[path[-1]]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(hostile))
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(list(parent)))] = copy.deepcopy(parent[path[-1]])
        else:
            parent.append(copy.deepcopy(parent[path[-1]]))
    return tree


@st.composite
def damaged_bytes(draw: DrawFn, sound: bytes) -> bytes:
    """The bytes cut, flipped, doubled, or with something foreign inside."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["cut", "flip", "insert", "double", "overwrite"]))
        if how == "cut":
            del data[at:]
        elif how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        else:
            foreign = draw(st.binary(min_size=1, max_size=8) | st.sampled_from(_FOREIGN))
            data[at : at + (len(foreign) if how == "overwrite" else 0)] = foreign
    return bytes(data)


_FOREIGN = [
    b"\xff\xfe", b"\0", b"\r\n", b"\xef\xbb\xbf", b"NaN", b"1e999", b"-", b"9" * 5000, b'"', b"{", b"]",
    b"\\ud800", b"\x1b]0;x\x07",
]  # fmt: skip


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def damaged_json(sound: Any, values: list[Any] | None = None) -> SearchStrategy[bytes]:
    """A JSON file: other values in the tree, or other bytes in the text, or nothing of it at all."""
    deep = [b"[" * DEEP, b'{"a":' * DEEP, b'{"model_type":' + b"[" * DEEP + b"]" * DEEP + b"}"]
    return st.one_of(
        damaged_tree(sound, values).map(as_json),
        damaged_tree(sound, values).map(as_json),
        damaged_bytes(as_json(sound)),
        st.sampled_from([*deep, b"", b"null", b"[]", b"{}", b"7", b'"x"', b"\xff", b"9" * 5000]),
    )
