"""Counts, from the tests themselves: what each one tried and survived is a property of its report.

A report comes from whichever process ran the test, as soon as it has run. So counts add up under xdist, and
those of a worker that dies later are there already.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
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
_began = time.monotonic()
_counted: Counter[str] = Counter()
_outcomes: dict[str, str] = {}
"""Of every test: how its call ended, or its setup if that is as far as it came."""


def named_tests(*, faults_only: bool = False) -> set[str]:
    """Test names in the tables of docs/reliability.md."""
    text = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    return set(re.findall(r"`(test_\w+)`", text.partition("## Hostile input")[0] if faults_only else text))


def name_of(nodeid: str) -> str:
    """The function, without its file and its case."""
    return nodeid.rpartition("::")[2].partition("[")[0]


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
    if report.when != "teardown":
        _outcomes[report.nodeid] = report.outcome
        return
    counts = {key: int(value) for key, value in report.user_properties if key in COUNTS}
    if name_of(report.nodeid) in named_tests(faults_only=True):
        counts.setdefault("faults", 1)  # each case of a test that does not count them itself
    for key, value in counts.items():
        if _outcomes.get(report.nodeid) == "passed" or key == "lost":
            _counted[key] += value


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """An item lost is a failure, whatever the test that lost it thought of it."""
    if _counted["lost"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def kept() -> tuple[set[str], set[str]]:
    """Tests of the tables all of whose cases passed, and those that could not run here."""
    ended: dict[str, set[str]] = {}
    for nodeid, outcome in _outcomes.items():
        ended.setdefault(name_of(nodeid), set()).add(outcome)
    named = {name: ended[name] for name in named_tests() & ended.keys()}
    return {n for n, how in named.items() if how == {"passed"}}, {
        n for n, how in named.items() if "skipped" in how
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts; and the same as a line of the table in docs/reliability.md."""
    if not _counted:
        return
    passed, skipped = kept()
    seconds, tests = time.monotonic() - _began, f"{len(passed)} of {len(named_tests())}"
    terminalreporter.section("reliability")
    for key, label in COUNTS.items():
        terminalreporter.write_line(f"{label:36} {_counted[key]:>8,}")
    terminalreporter.write_line(f"{'tests of the tables that passed':36} {tests:>8}")
    terminalreporter.write_line(f"{'seconds':36} {seconds:>8,.0f}")
    for name in sorted(skipped):
        terminalreporter.write_line(f"could not run here: {name}")
    figures = [f"{_counted[key]:,}" for key in COUNTS]
    terminalreporter.write_line(
        f"| {' | '.join([date.today().isoformat(), *figures, tests, f'{seconds:.0f}'])} |"
    )
