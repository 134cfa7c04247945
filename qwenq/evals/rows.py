"""Make rows of scores, each compared with the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from qwenq.errors import UsageError
from qwenq.evals.accuracy import RESAMPLES, SEED, Accuracy, macro_accuracy, micro_accuracy
from qwenq.evals.run import Answers, Judged, Plan
from qwenq.evals.served import Contestant, Served
from qwenq.evals.task import Score
from qwenq.evals.tasks.averages import MAIN
from qwenq.paired.base import choose_base
from qwenq.paired.compare import compare
from qwenq.results import RESULTS_FILE, Row, Value, read_rows


def rows_of(
    eval_model: Contestant,
    plan: Plan,
    answers: Answers,
    base: Row | None,
    settings: Mapping[str, Any],
    command: str = "",
    apart: str | None = None,
) -> list[Row]:
    """Return a row for each score; the first, main one also holds the verdict on every item.

    Args:
        base: the row of the base, see ``base_row``; None: not in this run folder.
        settings: everything else that the value depends on.
        command: as the user typed it.
        apart: why rows of the base do not match, if there are any.
    """
    rows = []
    for place, score in enumerate(plan.task.scores(answers.judged)):
        found = _accuracy(score, answers.judged)
        details: dict[str, Any] = {"parts": dict(score.parts), "categories": dict(score.categories)}
        details["average"] = "macro" if score.macro else "micro"
        details["standard_error"] = found.error
        details["command"] = command or None
        details["notes"] = [*plan.notes, *cut_short(plan, answers)] or None
        if place == 0:
            details["items"] = verdicts(answers.judged)
            details["base"] = None if isinstance(eval_model, Served) else eval_model.base
            details["questions"] = answers.questions or None
            if answers.written:
                details["cut"] = {"answers": answers.cut, "of": answers.written}
            details |= _beside(base, details, score.value) if base is not None else {"unpaired": apart}
        rows.append(
            Row(
                metric=score.metric,
                model=eval_model.model,
                point=point_of(plan),
                value=score.value,
                unit="share",
                low=found.low,
                high=found.high,
                n=score.n,
                implementation="; ".join(answers.implementations),
                settings={**dict(settings), **_interval(score, found)},
                details={name: value for name, value in details.items() if value not in ({}, None)},
                date=date.today().isoformat(),
            )
        )
    return rows


def cut_short(plan: Plan, answers: Answers) -> list[str]:
    """Return a notice where answers reached their limit of tokens."""
    if not answers.cut:
        return []
    cut = f"{answers.cut:,} of {len(answers.judged):,} answers to {plan.task.name}"
    return [f"{cut} were cut at their limit of tokens, before they ended"]


def point_of(plan: Plan) -> dict[str, Value]:
    """Return the point: equal for two models that were asked the same."""
    point: dict[str, Value] = {
        "task": plan.task.name,
        "protocol": plan.task.protocol,
        "version": plan.task.version,
        "limit": plan.limit,
        "shots": plan.shots,
    }
    if plan.thinking:
        point["thinking"] = "on"
    if plan.max_new_tokens is not None:
        point["max_new_tokens"] = plan.max_new_tokens
    if plan.subjects:
        point["subjects"] = ",".join(sorted(plan.subjects))
    if plan.source.sample:
        point["data"] = "sample suite"
    return point


def verdicts(judged: Judged) -> dict[str, bool]:
    """Return the main verdict by item id."""
    return {item.id: judgement.correct for item, judgement in judged}


def _beside(base: Row, details: Mapping[str, Any], score: float) -> dict[str, Any]:
    """Return ``paired``, the comparison with the base, or ``unpaired``, why there is none."""
    if base.value is None:
        return {}
    questions = base.details.get("questions"), details["questions"]
    found = compare(base.details["items"], details["items"], questions=questions)
    if isinstance(found, str):
        return {"unpaired": found}
    return {"paired": {**found.to_json(score - base.value), "base": base.model.precision}}


def base_row(run: Path, eval_model: Contestant, plan: Plan) -> Row | None:
    """Return the base's row at the same point of this run folder, by the fingerprint ``Contender.base``.

    Of several precisions `choose_base` takes one, as in reports; of several rows the last counts.

    Raises:
        UsageError: a broken row.
    """
    if isinstance(eval_model, Served) or eval_model.base is None or not (run / RESULTS_FILE).exists():
        return None
    point = point_of(plan)
    found = {
        row.model.precision: row
        for row in read_rows(run)
        if (row.metric, row.status, row.model.family, row.point)
        == (MAIN, "ok", eval_model.model.family, point)
        and row.model.fingerprint == eval_model.base
        and isinstance(row.details.get("items"), dict)
    }
    return choose_base(found, eval_model.how.dtype)


def asked_apart(run: Path, eval_model: Contestant, plan: Plan) -> str | None:
    """Return why rows of the base on this task do not match; None without any, or where one does.

    Raises:
        UsageError: a broken row.
    """
    if isinstance(eval_model, Served) or eval_model.base is None or not (run / RESULTS_FILE).exists():
        return None
    point = point_of(plan)
    found = [
        row.point
        for row in read_rows(run)
        if row.metric == MAIN
        and row.model.fingerprint == eval_model.base
        and row.point.get("task") == plan.task.name
    ]
    if not found or point in found:
        return None
    other = [key for key in {**found[-1], **point} if found[-1].get(key) != point.get(key)]
    return f"its base was evaluated with another {', '.join(other)}: evaluate both alike"


def _accuracy(score: Score, judged: Judged) -> Accuracy:
    correct = _correct(score.metric, judged)
    if score.macro:
        return macro_accuracy(correct, [item.subject for item, _ in judged])
    return micro_accuracy(correct)


def _correct(metric: str, judged: Judged) -> Sequence[bool]:
    """Return a metric's verdicts: of ``accuracy`` the main ones, of ``accuracy.NAME`` those called NAME."""
    if metric == MAIN:
        return [judgement.correct for _, judgement in judged]
    name = metric.removeprefix(f"{MAIN}.")
    try:
        return [judgement.also[name] for _, judgement in judged]
    except KeyError as error:
        raise UsageError(f"no verdicts for the metric {metric}") from error


def _interval(score: Score, found: Accuracy) -> dict[str, Any]:
    """Return the interval's method; nothing without an interval."""
    if found.low is None:
        return {}
    if score.macro and found.error:
        return {"interval": f"bootstrap within subjects, {RESAMPLES} resamples", "seed": SEED}
    return {"interval": "Wilson"}
