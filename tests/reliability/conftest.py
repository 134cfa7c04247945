"""Counts, from the tests themselves: what each one tried and survived is a property of its report."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attempts import Tally

TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
COUNTS = {
    "faults": "faults survived",
    "bad_inputs": "bad inputs tried",
    "refused": "  of them refused with a message",
    "lost": "items lost",
}
_counted: Counter[str] = Counter()
_passed: set[str] = set()


def named_faults() -> set[str]:
    """Test names in the table of faults of docs/reliability.md."""
    text = TABLE.read_text(encoding="utf-8").partition("## Hostile input")[0] if TABLE.exists() else ""
    return set(re.findall(r"`(test_\w+)`", text))


@pytest.fixture
def tally(record_property: pytest.FixtureRequest) -> Iterator[Tally]:
    """Where a test counts the inputs that it tries."""
    made = Tally()
    yield made
    record_property("bad_inputs", made.tried)  # type: ignore[operator]
    record_property("refused", made.refused)  # type: ignore[operator]
    print(f"{made.tried} tried, {made.refused} refused, {made.most_bytes:,} bytes, {made.slowest:.2f} s")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What is recorded is whole with the teardown's report; nothing that failed counts as survived."""
    if report.when == "call" and report.passed:
        _passed.add(report.nodeid)
    if report.when != "teardown":
        return
    counts = {key: int(value) for key, value in report.user_properties if key in COUNTS}
    name = report.nodeid.rpartition("::")[2].partition("[")[0]
    if name in named_faults():
        counts.setdefault("faults", 1)  # each case of a test that does not count them itself
    for key, value in counts.items():
        if report.nodeid in _passed or key == "lost":
            _counted[key] += value


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _counted:
        return
    terminalreporter.section("reliability")
    for key, label in COUNTS.items():
        terminalreporter.write_line(f"{label:36} {_counted[key]:>8,}")
