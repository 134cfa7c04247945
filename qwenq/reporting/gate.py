"""Decide which differences of two runs fail, and write the verdict for terminal, pull request and CI."""

from __future__ import annotations

import re
import secrets
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from typing import Literal

from qwenq.comparison import TaskComparison, headline, points
from qwenq.environment import measured_on
from qwenq.errors import UsageError
from qwenq.recipe import FAIL_ON
from qwenq.reporting.card import cut_of
from qwenq.reporting.collect import OTHER_MACHINE, PRECISIONS, UNKNOWN, hardware
from qwenq.reporting.compare import METRICS, Comparison, corrected
from qwenq.reporting.text import LONGEST_SENTENCE, clean, count, format_of, markdown, signed
from qwenq.results import Row
from qwenq.statistics import MARGIN, p_phrase

# Decide which differences fail and give the verdict; a row that is not comparable never passes.
#
# A condition is ``metric:rule``, several are separated by commas: docs/reports.md, "Compare". Of speeds and
# times the most favourable ratio that both intervals allow counts, so that noise does not fail. With fewer
# than three measurements on either side noise is unknown, and the row is not judged; without an interval it
# is judged, by its ratio alone, only if a condition names it.


PASSED, REGRESSION, NOT_COMPARABLE = 0, 1, 3
"""Exit codes. 2 is a usage error."""
GROUPS = {"perplexity", "speed", "memory", "time", "energy", "bandwidth", "failed"}
"""Metrics of several kinds: a condition without a dot covers them all."""
LEAST = 3
"""Fewest measurements of a speed, time or energy, over all repeats, that the gate judges."""
_DUST = 1e-12
"""Rounding error of a difference of two floats, as in 0.46 - 0.48 < -0.02."""
Outcome = Literal["regression", "not comparable", "passed", "not judged"]


@dataclass(frozen=True)
class Condition:
    """One condition; ``limit`` None means ``significant``, ``precision`` None any."""

    metric: str
    sign: Literal["<", ">"]
    limit: float | None
    precision: str | None = None

    def __str__(self) -> str:
        name = self.metric if self.precision is None else f"{self.metric}@{self.precision}"
        return f"{name}:{'significant' if self.limit is None else f'{self.sign}{self.limit:g}'}"

    def covers(self, row: Row) -> bool:
        """Return whether the condition applies to a row."""
        metric = row.metric
        named = metric == self.metric or (self.metric in GROUPS and metric.startswith(f"{self.metric}."))
        return named and self.precision in (None, row.model.precision)

    def violated(self, item: Comparison) -> bool | None:
        """Return whether a comparison fails; None if that is unknown."""
        if self.limit is None:
            return None if item.real is None else item.real and item.worse
        if item.change is None:
            return None
        change = item.change if item.kindest is None else item.kindest
        beyond = self.limit - change if self.sign == "<" else change - self.limit
        relation = METRICS[self.metric.partition(".")[0]].relation
        return beyond > (_DUST if relation == "difference" else 0.0)


@dataclass(frozen=True)
class Judged:
    """A comparison and the gate's judgement."""

    comparison: Comparison
    outcome: Outcome
    # the one that decided, else the first that applies; None if no condition applies
    condition: Condition | None = None
    reason: str = ""
    answered: tuple[Condition, ...] = ()  # all conditions that could be judged by this row


@dataclass(frozen=True)
class Verdict:
    """The gate's judgement of a whole run."""

    judged: tuple[Judged, ...]  # every row
    conditions: tuple[Condition, ...]
    idle: tuple[Condition, ...]  # conditions that judged no row
    # idle conditions whose rows the baseline did measure: they were too few or too noisy
    blind: tuple[Condition, ...]
    strict: bool  # whether an idle condition is a failure, because the user named it

    def of(self, outcome: Outcome) -> list[Judged]:
        """Return the rows with an outcome."""
        return [item for item in self.judged if item.outcome == outcome]

    @property
    def failed(self) -> list[Judged]:
        """Return the rows that fail the gate."""
        return [*self.of("regression"), *self.of("not comparable")]

    @property
    def fallback_notice(self) -> list[Judged]:
        """Return rows of both runs under a condition that are too few or too noisy to judge."""
        asked = [item for item in self.of("not judged") if item.condition is not None]
        return [item for item in asked if item.comparison.comparable]

    @property
    def unjudged(self) -> tuple[Condition, ...]:
        """Return the conditions whose failure to judge a row is an error."""
        return self.idle if self.strict else self.blind

    @property
    def exit_code(self) -> int:
        """Return 0 for passed, 1 for a regression, else 3 for not comparable."""
        if self.of("regression"):
            return REGRESSION
        nothing = bool(self.conditions) and not self.of("passed")
        return NOT_COMPARABLE if self.of("not comparable") or self.unjudged or nothing else PASSED

    @property
    def headline(self) -> str:
        """Return the verdict in one sentence."""
        asked = len(self.judged) - len(self.of("not judged"))
        if not self.conditions:
            return f"Compared {count(len(self.judged), 'rows')}; no condition was given"
        if self.exit_code == REGRESSION:
            return (
                f"Regression: {len(self.of('regression'))} of {count(asked, 'rows')} got worse than allowed"
            )
        if apart := self.of("not comparable"):
            return f"Not comparable: {len(apart)} of {count(asked, 'rows')}, which is not a pass"
        if self.exit_code == NOT_COMPARABLE:
            return "Not comparable: there was nothing to judge, which is not a pass"
        unsure = f"; {len(self.fallback_notice)} could not be judged" if self.fallback_notice else ""
        return f"Passed: no condition failed in {count(asked, 'rows')}{unsure}"

    @property
    def accuracies(self) -> str:
        """Return one sentence on all paired accuracies, passed or not; empty if there are none."""
        tested, unpaired = [], 0
        for item in (judged.comparison for judged in self.judged):
            if item.pairing is not None and item.before is not None and item.after is not None:
                scores = item.before.value or 0.0, item.after.value or 0.0
                p = item.pairing.p if item.p is None else item.p
                tested.append(TaskComparison(item.name, *scores, item.pairing, p))
            elif item.before is not None and item.row.metric == "accuracy":
                unpaired += 1
        return headline(tested, len(tested), unpaired) if tested else ""

    @property
    def warnings(self) -> list[str]:
        """Return a line for each score of which many answers were cut at their limit of tokens."""
        return [
            f"{item.name}, {which}: {found.warning}"
            for item in (judged.comparison for judged in self.judged)
            for which, row in (("baseline", item.before), ("new", item.after))
            if row is not None and (found := cut_of(row)) is not None and found.many
        ]


def judge(
    comparisons: Sequence[Comparison], conditions: Sequence[Condition], *, strict: bool = True
) -> Verdict:
    """Apply conditions to comparisons: a row fails if it violates one of those that cover it.

    p is corrected again, for the accuracies that a condition tests. If ``strict``, because the user named it,
    a condition that judges no row is a failure.
    """
    tests = [condition for condition in conditions if condition.limit is None]
    items = corrected(comparisons, lambda item: any(test.covers(item.row) for test in tests))
    judged = tuple(_judge(item, conditions) for item in items)
    active = {condition for item in judged for condition in item.answered}
    idle = tuple(condition for condition in conditions if condition not in active)
    measured = [item.before for item in comparisons if item.before and item.before.status == "ok"]
    blind = tuple(condition for condition in idle if any(condition.covers(row) for row in measured))
    return Verdict(judged, tuple(conditions), idle, blind, strict)


def _judge(item: Comparison, conditions: Sequence[Condition]) -> Judged:
    asked = [condition for condition in conditions if condition.covers(item.row)]
    if not asked:
        return Judged(item, "not judged", reason=item.why)
    if item.before is None or item.before.status != "ok":
        return Judged(item, "not judged", asked[0], item.why or "the baseline has no such row")
    if not item.comparable:
        return Judged(item, "not comparable", asked[0], item.why, tuple(asked))
    return _apply(item, asked)


def _apply(item: Comparison, asked: list[Condition]) -> Judged:
    """Judge by the first condition that is violated, else the first of unknown result, else pass."""
    noisy = item.metric is not None and item.metric.noisy
    # A row without a count was measured once.
    few = min(1 if row is None or row.n is None else row.n for row in (item.before, item.after))
    if noisy and few < LEAST:
        why = f"too few measurements to judge: {few}, at least {LEAST} are needed"
        return Judged(item, "not judged", asked[0], why)
    named = [condition for condition in asked if condition.metric == item.row.metric]
    if noisy and item.real is None:
        if not named:
            why = f"{item.why}; name {item.row.metric} to judge it anyway"
            return Judged(item, "not judged", asked[0], why)
        asked = named
    results = {condition: condition.violated(item) for condition in asked}
    answered = tuple(condition for condition, violated in results.items() if violated is not None)
    outcomes: dict[bool | None, Outcome] = {True: "regression", None: "not comparable", False: "passed"}
    condition = min(results, key=lambda condition: list(outcomes).index(results[condition]))
    return Judged(item, outcomes[results[condition]], condition, item.why, answered)


_CONDITION = re.compile(
    r"\s*([\w.]+)(?:@(\w+))?\s*:\s*(?:(significant)|([<>])\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))\s*"
)


def _refused(what: str, hint: str) -> UsageError:
    return UsageError(what, where="--fail-on", hint=hint)


def parse(text: str) -> list[Condition]:
    """Parse conditions such as ``accuracy:significant, kl:>0.05``."""
    return [_condition(part) for part in text.split(",") if part.strip()]


def asked_by(fail_on: str | None) -> list[Condition]:
    """Return the conditions of ``--fail-on`` or of a recipe's gate; None: the default, ``none``: empty.

    An empty text, as in ``--fail-on "$UNSET"``, must not pass.
    """
    if fail_on == "none":
        return []
    found = parse(FAIL_ON if fail_on is None else fail_on)
    if not found:
        raise _refused("no condition is named", "write none to only compare, or leave the option out")
    return found


def _condition(part: str) -> Condition:
    found = _CONDITION.fullmatch(part)
    metric = part.partition(":")[0].partition("@")[0].strip()
    rule = METRICS.get(metric.partition(".")[0])
    if rule is None:
        near = get_close_matches(metric, METRICS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known metrics: {', '.join(METRICS)}"
        raise _refused(f"unknown metric {metric!r}", hint)
    sign: Literal["<", ">"] = "<" if rule.better == "up" else ">"
    example = f"write {metric}:significant or {metric}:{sign}{_EXAMPLES[rule.relation][rule.better]}"
    if found is None:
        raise _refused(f"{part.strip()!r} is not a condition", example)
    if found[2] not in (None, *PRECISIONS):
        known = f"known precisions: {', '.join(PRECISIONS)}"
        raise _refused(f"{part.strip()!r} does not name a precision", known)
    if found[3]:
        return Condition(metric, sign, None, found[2])
    if found[4] != sign:
        better = "more" if rule.better == "up" else "less"
        raise _refused(f"{part.strip()!r} would fail an improvement: {better} {metric} is better", example)
    limit = float(found[5])
    if wrong := _beyond(limit, metric):
        raise _refused(f"{part.strip()!r}: {wrong}", example)
    return Condition(metric, sign, limit, found[2])


def _beyond(limit: float, metric: str) -> str:
    """Return why no measurement could be beyond a limit, usually one given in per cent; else empty."""
    relation = METRICS[metric.partition(".")[0]].relation
    if relation == "ratio" and not 0 < limit <= _MOST_RATIO:
        return "the limit is a ratio of new to baseline, not a percentage"
    if metric.partition(".")[0] in _SHARES and abs(limit) >= 1:
        return "the limit is a share above -1, not a percentage"
    return "" if isfinite(limit) else "the limit is not a finite number"


_MOST_RATIO = 10.0
_SHARES = ("accuracy", "same_top")
_EXAMPLES = {"ratio": {"up": "0.95", "down": "1.05"}, "difference": {"up": "-0.02", "down": "0.05"}}

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
    p = p_phrase(1.0 if item.p is None else item.p)
    return f"{shown}; {item.pairing.lost} lost, {item.pairing.won} won, {p}"


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
    for judged in [*verdict.failed, *changed]:
        yield f"{judged.outcome:<15}{judged.comparison.name}"
        yield f"{'':<15}{_joined(change_text(judged.comparison), effect(judged), _reason(judged))}"
    if rest := Counter(effect(item) for item in passed if item not in changed):
        kinds = ", ".join(f"{number} {kind}" for kind, number in rest.items())
        yield f"{count(rest.total(), 'rows')} passed: {kinds}"
    for judged in verdict.fallback_notice:
        yield f"{judged.outcome:<15}{judged.comparison.name}"
        yield f"{'':<15}{change_text(judged.comparison)}; {_reason(judged)}"
    if others := _not_judged(verdict):
        yield _rest(others)
    yield from (f"warning: {line}" for line in verdict.warnings)
    for condition in verdict.idle:
        yield f"{condition} {_idle(verdict, condition)}"
    if accuracies := verdict.accuracies:
        yield f"accuracy: {accuracies}"
    yield f"{verdict.headline}."


def _not_judged(verdict: Verdict) -> list[Judged]:
    """Return rows that no condition covers or that only one run has."""
    return [judged for judged in verdict.of("not judged") if judged not in verdict.fallback_notice]


def _rest(rows: list[Judged]) -> str:
    """Return ``3 rows only in the new run: 2 kl, size``."""
    parts = []
    for new, what in (
        (False, "not covered by a condition, or not measured in the baseline"),
        (True, "only in the new run"),
    ):
        items = [row.comparison for row in rows if (row.comparison.before is None) is new]
        counts = Counter(clean(item.row.metric) for item in items)
        metrics = ", ".join(name if number == 1 else f"{number} {name}" for name, number in counts.items())
        parts += [f"{count(len(items), 'rows')} {what}: {metrics}"] if items else []
    return "; ".join(parts)


def _idle(verdict: Verdict, condition: Condition) -> str:
    blind = condition in verdict.blind
    return f"judged nothing: {'no row has what it needs' if blind else 'the baseline has no such row'}"


def _reason(judged: Judged) -> str:
    return _joined(f"fails {judged.condition}" if judged.outcome == "regression" else "", judged.reason)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def markdown_text(verdict: Verdict, baseline: str, new: str) -> str:
    """Return a comment for a pull request: the verdict, what failed, and the rest folded."""
    parts = [f"### {markdown(verdict.headline)}", f"{markdown(baseline)} → {markdown(new)}"]
    if accuracies := verdict.accuracies:
        parts.append(f"Accuracy: {markdown(accuracies, LONGEST_SENTENCE)}.")
    if warnings := verdict.warnings:
        parts.append("\n".join(f"- Warning: {markdown(line)}" for line in warnings))
    if verdict.failed:
        parts.append(_table(verdict.failed))
    if few := verdict.fallback_notice:
        parts.append(f"{count(len(few), 'rows')} could not be judged:")
        parts.append(_table(few))
    if verdict.idle:
        parts.append("\n".join(f"- {markdown(c)} {_idle(verdict, c)}" for c in verdict.idle))
    parts += _explained(verdict)
    if passed := verdict.of("passed"):
        parts.append(_folded(f"{count(len(passed), 'rows')} passed", passed))
    if rest := _not_judged(verdict):
        parts.append(_folded(markdown(_rest(rest)), rest))
    if verdict.conditions:
        rules = ", ".join(markdown(condition) for condition in verdict.conditions)
        parts.append(f"Fails on {rules}. Accuracies are paired item by item; p is corrected by Holm.")
    return "\n\n".join(parts) + "\n"


def _explained(verdict: Verdict) -> Iterator[str]:
    """Yield what "not comparable" means, and what mends it, where rows are."""
    rows = verdict.of("not comparable")
    if not rows:
        return
    yield (
        "Not comparable is no pass: such a row was measured of something else, or elsewhere, so nothing is "
        "known about it."
    )
    if any(judged.reason.startswith(OTHER_MACHINE) for judged in rows):
        found = {
            hardware(measured_on({}, row.settings)) for judged in rows if (row := judged.comparison.after)
        }
        machines = markdown(" and ".join(sorted(found - {UNKNOWN})))
        this = f"; this run was measured on {machines}" if machines else ""
        yield (
            f"Speed and memory are compared on one kind of machine only{this}. To have a baseline of it, "
            "keep `results.jsonl` and `environment.json` of this run as a folder beside the other baselines, "
            "and name the folder that holds them all."
        )


def _table(rows: list[Judged]) -> str:
    lines = ["| | measurement | baseline → new | |", "| --- | --- | --- | --- |"]
    for judged in rows[:MOST_ROWS]:
        item = judged.comparison
        cells = (judged.outcome if judged.outcome != "not judged" else "", item.name, change_text(item))
        result = _joined(effect(judged), _reason(judged))
        lines.append(f"| {' | '.join(markdown(cell) for cell in (*cells, result))} |")
    more = [f"\n… and {len(rows) - MOST_ROWS} more."] if len(rows) > MOST_ROWS else []
    return "\n".join([*lines, *more])


def _folded(title: str, rows: list[Judged]) -> str:
    return f"<details><summary>{title}</summary>\n\n{_table(rows)}\n\n</details>"


def junit_text(verdict: Verdict) -> str:
    """Return JUnit XML: a failure is a regression, an error a row that is not comparable."""
    cases = list(_test_cases(verdict))
    tags = Counter(tag for *_, tag, _ in cases)
    counts = {"failures": tags["failure"], "errors": tags["error"], "skipped": tags["skipped"]}
    attributes = {"tests": str(len(cases)), **{name: str(number) for name, number in counts.items()}}
    suite = ET.Element("testsuite", {"name": "qwenq compare", **attributes})
    for kind, name, tag, message in cases:
        case = ET.SubElement(suite, "testcase", {"classname": kind, "name": name})
        if tag:
            ET.SubElement(case, tag, {"message": message})
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def _test_cases(verdict: Verdict) -> Iterator[tuple[str, str, str, str]]:
    """Yield class, name, tag of the outcome and message of each test; one that passed has no tag."""
    tags = {"regression": "failure", "not comparable": "error", "not judged": "skipped", "passed": ""}
    for judged in verdict.judged:
        item = judged.comparison
        message = _joined(_reason(judged), change_text(item)) or "no condition"
        yield clean(item.row.metric), item.name, tags[judged.outcome], clean(message)
    for condition in verdict.idle:
        tag = "error" if condition in verdict.unjudged else "skipped"
        yield condition.metric, str(condition), tag, _idle(verdict, condition)
    if _judged_nothing(verdict):
        yield "gate", "something to judge", "error", verdict.headline


def github_annotations(verdict: Verdict) -> Iterator[str]:
    """Yield workflow commands that GitHub shows at a change."""
    if _judged_nothing(verdict):
        yield f"::error title=qwenq compare::{_data(verdict.headline)}"
    for judged in verdict.failed:
        result = _joined(change_text(judged.comparison), _reason(judged))
        yield f"::error title={_property(judged.comparison.name)}::{_data(f'{judged.outcome}: {result}')}"
    for condition in verdict.idle:
        level = "error" if condition in verdict.unjudged else "notice"
        yield f"::{level} title={_property(str(condition))}::{_idle(verdict, condition)}"


def _data(text: str) -> str:
    return clean(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def without_commands(lines: Iterable[str]) -> Iterator[str]:
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
    return verdict.exit_code == NOT_COMPARABLE and not verdict.failed and not verdict.unjudged
