"""Write the verdict for a terminal, a pull request, a test report, and GitHub's annotations."""

from __future__ import annotations

import secrets
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator

from qwenq.paired.compare import points
from qwenq.paired.equivalence import MARGIN
from qwenq.paired.mcnemar import said_p
from qwenq.reporting.compare import Comparison
from qwenq.reporting.cut import cut_of
from qwenq.reporting.gate import NOT_COMPARABLE, Condition, Judged, Verdict
from qwenq.reporting.text import clean, count, markdown
from qwenq.reporting.units import format_of, signed

UNCHANGED = {"the same", "within noise", "inconclusive", f"no loss beyond {points(MARGIN)} points"}
"""Effects of passed rows that are only counted."""
MOST_ROWS = 60
"""Rows of a table in a comment, which GitHub cuts at 65,536 characters."""


def change_text(item: Comparison) -> str:
    """Return ``48.0 → 43.6 %, −4.4; 22 lost, 0 won, p < 0.001`` or ``54.10 → 48.20 tokens/s, × 0.891``."""
    before, after, metric = item.before, item.after, item.metric
    if before is None or after is None or before.value is None or after.value is None or metric is None:
        return ""
    write = format_of(before.metric, before.unit)
    shown = f"{write(before.value)} → {write(after.value)} {write.unit}"
    if item.change is None:
        return shown
    if write(before.value) == write(after.value) and before.unit == "bytes" and item.change != 1:
        # A size may not grow by a byte: two rounded figures would not show why it fails.
        return f"{before.value:,.0f} → {after.value:,.0f} bytes, × {item.change:.10g}"
    if metric.relation == "ratio":
        return f"{shown}, × {item.change:.3f}"
    digits = len(write(0.0).partition(".")[2])
    shown = f"{shown}, {signed(item.change * write.scale, digits)}"
    if item.pairing is None:
        return shown
    p = said_p(1.0 if item.p is None else item.p)
    shown = f"{shown}; {item.pairing.lost} lost, {item.pairing.won} won, {p}"
    warnings = [
        f"{which}: {found.warning}"
        for which, row in (("baseline", before), ("new", after))
        if (found := cut_of(row)) is not None and found.many
    ]
    return "; ".join([shown, *warnings])


def effect(judged: Judged) -> str:
    """Return a word or two for a difference."""
    item = judged.comparison
    if item.before is None or item.after is None or not item.comparable:
        return "new" if item.before is None else ""
    same = item.before.value == item.after.value
    if item.pairing is not None and item.real and (same or item.worse is not item.score_is_worse):
        return f"{'worse' if item.worse else 'better'} by items"
    if same:
        return "the same"
    if item.real is False and item.pairing is not None:
        return f"no loss beyond {points(MARGIN)} points" if item.pairing.equivalent else "inconclusive"
    if item.real is False:
        return "within noise"
    word = "worse" if item.worse else "better"
    return word if item.real else f"{word}, or noise"


def text_lines(verdict: Verdict) -> Iterator[str]:
    """Yield lines for a terminal: failures, changes that did not fail, the verdict."""
    passed = verdict.of("passed")
    changed = [item for item in passed if effect(item) not in UNCHANGED]
    for judged in [*verdict.of("regression"), *verdict.of("not comparable"), *changed]:
        yield f"{judged.outcome:<15}{judged.comparison.name}"
        parts = (change_text(judged.comparison), effect(judged), _reason(judged))
        yield f"{'':<15}{'; '.join(part for part in parts if part)}"
    if same := len(passed) - len(changed):
        yield f"{count(same, 'rows')} passed without a difference"
    for judged in verdict.passed_over:
        yield f"{judged.outcome:<15}{judged.comparison.name}"
        yield f"{'':<15}{change_text(judged.comparison)}; {_reason(judged)}"
    if rest := _not_judged(verdict):
        yield _rest(rest)
    for condition in verdict.idle:
        yield f"{condition} {_idle(verdict, condition)}"
    if accuracies := verdict.accuracies:
        yield f"accuracy: {accuracies}"
    yield f"{verdict.headline}."


def _not_judged(verdict: Verdict) -> list[Judged]:
    """Return rows that no condition covers or that only one run has."""
    return [judged for judged in verdict.of("not judged") if judged not in verdict.passed_over]


def _rest(rows: list[Judged]) -> str:
    """Return ``3 rows only in the new run: 2 kl, size``."""
    new = [row for row in rows if row.comparison.before is None]
    old = [row for row in rows if row.comparison.before is not None]
    groups = [
        (old, "not covered by a condition, or not measured in the baseline"),
        (new, "only in the new run"),
    ]
    return "; ".join(
        f"{count(len(group), 'rows')} {what}: {_metrics(group)}" for group, what in groups if group
    )


def _metrics(rows: list[Judged]) -> str:
    """Return ``kl, 2 size``."""
    counts = Counter(clean(row.comparison.row.metric) for row in rows)
    return ", ".join(metric if number == 1 else f"{number} {metric}" for metric, number in counts.items())


def _idle(verdict: Verdict, condition: Condition) -> str:
    if condition in verdict.blind:
        return "judged nothing: no row has what it needs"
    return "judged nothing: the baseline has no such row"


def _reason(judged: Judged) -> str:
    parts = [f"fails {judged.condition}"] if judged.outcome == "regression" else []
    return "; ".join([*parts, *([judged.reason] if judged.reason else [])])


def markdown_text(verdict: Verdict, baseline: str, new: str) -> str:
    """Return a comment for a pull request: the verdict, what failed, and the rest folded."""
    failed = [*verdict.of("regression"), *verdict.of("not comparable")]
    parts = [f"### {markdown(verdict.headline)}", f"{markdown(baseline)} → {markdown(new)}"]
    if accuracies := verdict.accuracies:
        parts.append(f"Accuracy: {markdown(accuracies)}.")
    if failed:
        parts.append(_table(failed))
    if few := verdict.passed_over:
        parts.append(f"{count(len(few), 'rows')} could not be judged:")
        parts.append(_table(few))
    if verdict.idle:
        parts.append("\n".join(f"- {markdown(c)} {_idle(verdict, c)}" for c in verdict.idle))
    if passed := verdict.of("passed"):
        parts.append(_folded(f"{count(len(passed), 'rows')} passed", passed))
    if rest := _not_judged(verdict):
        parts.append(_folded(markdown(_rest(rest)), rest))
    if verdict.conditions:
        rules = ", ".join(markdown(condition) for condition in verdict.conditions)
        parts.append(f"Fails on {rules}. Accuracies are paired item by item; p is corrected by Holm.")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Judged]) -> str:
    lines = ["| | measurement | baseline → new | |", "| --- | --- | --- | --- |"]
    for judged in rows[:MOST_ROWS]:
        item = judged.comparison
        cells = (judged.outcome if judged.outcome != "not judged" else "", item.name, change_text(item))
        result = "; ".join(part for part in (effect(judged), _reason(judged)) if part)
        lines.append(f"| {' | '.join(markdown(cell) for cell in (*cells, result))} |")
    more = [f"\n… and {len(rows) - MOST_ROWS} more."] if len(rows) > MOST_ROWS else []
    return "\n".join([*lines, *more])


def _folded(title: str, rows: list[Judged]) -> str:
    return f"<details><summary>{title}</summary>\n\n{_table(rows)}\n\n</details>"


def junit_text(verdict: Verdict) -> str:
    """Return JUnit XML: a failure is a regression, an error a row that is not comparable."""
    empty = _judged_nothing(verdict)
    counts = {
        "tests": len(verdict.judged) + len(verdict.idle) + empty,
        "failures": len(verdict.of("regression")),
        "errors": len(verdict.of("not comparable")) + len(verdict.unjudged) + empty,
        "skipped": len(verdict.of("not judged")) + len(verdict.idle) - len(verdict.unjudged),
    }
    suite = ET.Element("testsuite", {"name": "qwenq compare", **{key: str(n) for key, n in counts.items()}})
    tags = {"regression": "failure", "not comparable": "error", "not judged": "skipped"}
    for judged in verdict.judged:
        item = judged.comparison
        case = ET.SubElement(suite, "testcase", {"classname": clean(item.row.metric), "name": item.name})
        if tag := tags.get(judged.outcome):
            message = "; ".join(part for part in (_reason(judged), change_text(item)) if part)
            ET.SubElement(case, tag, {"message": clean(message or "no condition")})
    for condition in verdict.idle:
        case = ET.SubElement(suite, "testcase", {"classname": condition.metric, "name": str(condition)})
        tag = "error" if condition in verdict.unjudged else "skipped"
        ET.SubElement(case, tag, {"message": _idle(verdict, condition)})
    if empty:
        case = ET.SubElement(suite, "testcase", {"classname": "gate", "name": "something to judge"})
        ET.SubElement(case, "error", {"message": verdict.headline})
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def github_annotations(verdict: Verdict) -> Iterator[str]:
    """Yield workflow commands that GitHub shows at a change."""
    if _judged_nothing(verdict):
        yield f"::error title=qwenq compare::{_data(verdict.headline)}"
    for judged in (*verdict.of("regression"), *verdict.of("not comparable")):
        result = "; ".join(part for part in (change_text(judged.comparison), _reason(judged)) if part)
        yield f"::error title={_property(judged.comparison.name)}::{_data(f'{judged.outcome}: {result}')}"
    for condition in verdict.idle:
        level = "error" if condition in verdict.unjudged else "notice"
        yield f"::{level} title={_property(str(condition))}::{_idle(verdict, condition)}"


def _data(text: str) -> str:
    return clean(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def unheard(lines: Iterable[str]) -> Iterator[str]:
    """Wrap lines so that GitHub's runner takes no workflow commands from them: names in a run are untrusted.

    The runner takes ``::`` at the start of a line for a command, and ``##[`` anywhere (ActionCommand.cs of
    actions/runner). The cure is in GitHub's documentation, "Stopping and starting workflow commands".
    """
    token = secrets.token_hex(16)
    yield f"::stop-commands::{token}"
    yield from lines
    yield f"::{token}::"


def _judged_nothing(verdict: Verdict) -> bool:
    """Return whether the gate failed only because it had nothing to judge."""
    failed = verdict.of("regression") or verdict.of("not comparable") or verdict.unjudged
    return verdict.exit_code == NOT_COMPARABLE and not failed
