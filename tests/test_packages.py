"""The lists of packages agree with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = {"hatchling", "editables", "tomlkit", "trove-classifiers", "setuptools"}


def listed(path: str) -> list[str]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and line[0] != "#"]


def canonical(pin: str) -> tuple[str, str]:
    name, version = pin.split("==")
    return re.sub(r"[-_.]+", "-", name).lower(), version


@pytest.mark.parametrize(
    ("constraints", "hashes", "more"),
    [
        ("constraints.txt", ".ci/locked.txt", BUILD),
        ("tests/interop/constraints.txt", "tests/interop/locked.txt", {"gptqmodel"}),
    ],
)
def test_what_has_a_hash_is_what_is_pinned(constraints: str, hashes: str, more: set[str]) -> None:
    """The lists are made by .ci/lock: make them again when a version changes."""
    pinned = {canonical(line) for line in listed(constraints)}
    hashed = [re.fullmatch(r"(\S+==\S+) --hash=sha256:[0-9a-f]{64}", line) for line in listed(hashes)]
    assert all(hashed)
    locked = {canonical(line[1]) for line in hashed if line}
    assert {name for name, _ in pinned - locked} == {"torch"}
    assert {name for name, _ in locked - pinned} == more
