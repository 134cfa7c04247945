"""The counts of `make reliability`: of all processes, of one that died as well; red if anything is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = "`test_counts`, `test_each_case`\n## Hostile input\n`test_inputs`\n"
SOUND = """
import os, pytest

@pytest.mark.parametrize("kills", [5, 7, 11])
def test_counts(record_property, kills):
    record_property("faults", kills)
    record_property("lost", 0)

@pytest.mark.parametrize("case", "ab")
def test_each_case(case):
    pass

@pytest.mark.parametrize("case", range(4))
def test_inputs(tally, case):
    tally.tried += 10
    tally.refused += 9
"""
FAILED = (
    SOUND
    + """
def test_of_no_table(record_property):
    record_property("faults", 1000)
    assert False
"""
)
DEAD = (
    FAILED
    + """
def test_last():
    os._exit(3)
"""
)
LOST = (
    SOUND
    + """
def test_that_forgets_to_look(record_property):
    record_property("lost", 2)
"""
)


def counts(folder: Path, source: str) -> tuple[int, dict[str, int]]:
    """Exit status and figures of a run with two processes."""
    place = folder / "tests" / "reliability"
    place.mkdir(parents=True)
    for name in ("conftest.py", "attempts.py"):
        shutil.copy(HERE / name, place)
    (folder / "docs").mkdir()
    (folder / "docs" / "reliability.md").write_text(TABLE)
    (place / "test_some.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(place)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.findall(r"^ *(\w.*?) {2,}([\d,]+)(?: of [\d,]+)?$", done.stdout, re.M)
    assert found, done.stdout + done.stderr
    return done.returncode, {label: int(figure.replace(",", "")) for label, figure in found}


@pytest.mark.parametrize(
    ("source", "status", "lost"), [(SOUND, 0, 0), (FAILED, 1, 0), (DEAD, 1, 0), (LOST, 1, 2)]
)
def test_counts_are_those_of_tests_that_passed(tmp_path: Path, source: str, status: int, lost: int) -> None:
    code, found = counts(tmp_path, source)
    assert code == status
    assert found["faults survived"] == 5 + 7 + 11 + 2
    assert found["bad inputs tried"] == 40
    assert found["of them refused with a message"] == 36
    assert found["items lost"] == lost
    assert found["tests of the tables that passed"] == 3
