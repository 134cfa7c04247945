"""Make rows of results: scores with their intervals, comparisons with the base, figures of the check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from qwenq.comparison import choose_base, pair_verdicts
from qwenq.errors import CorruptFileError, QwenqError
from qwenq.evals.model import EvalModel
from qwenq.evals.run import Answers, TaskPlan
from qwenq.evals.task import MAIN, Judged, Score
from qwenq.events import Listener, Notice
from qwenq.models.folders import MANIFEST
from qwenq.models.integrity import verify_files
from qwenq.recipe import quantize_command
from qwenq.results import RESULTS_FILE, Model, Row, Value, append_row, read_rows, require_readable
from qwenq.statistics import RESAMPLES, SEED, Accuracy, macro_accuracy, micro_accuracy
from qwenq.storage import read_json

# Make rows of scores, each compared with the base's.


def rows_of(
    eval_model: EvalModel,
    plan: TaskPlan,
    answers: Answers,
    base: Row | str | None,
    settings: Mapping[str, Any],
    command: str = "",
) -> list[Row]:
    """Return a row for each score; the first, main one also holds the verdict on every item.

    Args:
        base: see ``base_row``.
        settings: everything else that the value depends on.
        command: as the user typed it.
    """
    rows = []
    for place, score in enumerate(plan.task.scores(answers.judged)):
        found = _accuracy(score, answers.judged)
        details: dict[str, Any] = {"parts": dict(score.parts), "categories": dict(score.categories)}
        details["average"] = "macro" if score.macro else "micro"
        details["standard_error"] = found.error
        details["command"] = command or None
        details["notes"] = [*plan.notes, *cut_notice(plan, answers)] or None
        if place == 0:
            details["items"] = verdicts(answers.judged)
            details["base"] = eval_model.base
            details["questions"] = answers.questions or None
            if answers.written:
                details["cut"] = {"answers": answers.cut, "of": answers.written}
            details |= _beside(base, details, score.value)
        rows.append(
            Row(
                metric=score.metric,
                model=eval_model.model,
                point=point_of(plan),
                value=score.value,
                unit="share",
                low=found.low,
                high=found.high,
                n=len(score.verdicts),
                implementation="; ".join(answers.implementations),
                settings={**dict(settings), **_interval(score, found)},
                details={name: value for name, value in details.items() if value not in ({}, None)},
                date=date.today().isoformat(),
            )
        )
    return rows


def cut_notice(plan: TaskPlan, answers: Answers) -> list[str]:
    """Return a notice where answers reached their limit of tokens."""
    if not answers.cut:
        return []
    cut = f"{answers.cut:,} of {len(answers.judged):,} answers to {plan.task.name}"
    return [f"{cut} were cut at their limit of tokens, before they ended"]


def point_of(plan: TaskPlan) -> dict[str, Value]:
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


def _beside(base: Row | str | None, details: Mapping[str, Any], score: float) -> dict[str, Any]:
    """Return ``paired``, the comparison with the base, or ``unpaired``, why there is none."""
    if not isinstance(base, Row):
        return {"unpaired": base}
    questions = base.details.get("questions"), details["questions"]
    found = pair_verdicts(base.details["items"], details["items"], questions=questions)
    if isinstance(found, str):
        return {"unpaired": found}
    return {"paired": {**found.to_json(score - (base.value or 0.0)), "base": base.model.precision}}


def base_row(run: Path, eval_model: EvalModel, plan: TaskPlan) -> Row | str | None:
    """Return the base's row at the same point of this run folder, by the fingerprint ``LocalModel.base``.

    Of several precisions `choose_base` takes one, as in reports; of several rows the last counts. Where the
    base was evaluated at another point alone, it is a phrase that says so; None without any evaluation.
    """
    if eval_model.base is None or not (run / RESULTS_FILE).exists():
        return None
    task = MAIN, eval_model.base, plan.task.name
    rows = [
        row for row in read_rows(run) if (row.metric, row.model.fingerprint, row.point.get("task")) == task
    ]
    point = point_of(plan)
    wanted = "ok", eval_model.model.family, point
    found = {
        row.model.precision: row
        for row in rows
        if (row.status, row.model.family, row.point) == wanted and isinstance(row.details.get("items"), dict)
    }
    base = choose_base(found, eval_model.settings["dtype"])
    if base is not None or not rows or point in [row.point for row in rows]:
        return base
    last = rows[-1].point
    other = [key for key in {**last, **point} if last.get(key) != point.get(key)]
    return f"its base was evaluated with another {', '.join(other)}: evaluate both alike"


def _accuracy(score: Score, judged: Judged) -> Accuracy:
    if score.macro:
        return macro_accuracy(score.verdicts, [item.subject for item, _ in judged])
    return micro_accuracy(score.verdicts)


def _interval(score: Score, found: Accuracy) -> dict[str, Any]:
    """Return the interval's method; nothing without an interval."""
    if found.low is None:
        return {}
    if score.macro and found.error:
        return {"interval": f"bootstrap within subjects, {RESAMPLES} resamples", "seed": SEED}
    return {"interval": "Wilson"}


# Turn the check in a model's manifest into rows; nothing is measured again.


UNITS = {"kl": "nats/token", "same_top": "share", "perplexity.ratio": "ratio"}
"""Metrics of the check that have an interval."""


def has_check(folder: Path) -> bool:
    """Return whether the folder has a manifest with a check; one of random weights has none."""
    try:
        return isinstance(read_json(folder / MANIFEST).get("check"), dict)
    except (CorruptFileError, OSError):
        return False


def append_check_rows(folder: Path, model: Model, run: Path) -> list[Row]:
    """Return the rows of a quantised model's check, and append those that the run folder does not have.

    The run folder has to be locked (``storage.locked``).
    """
    rows = _sound_rows(folder / MANIFEST, model)
    known = read_rows(run) if (run / RESULTS_FILE).exists() else []
    missing = [row for row in rows if not any(_same_row(other, row) for other in known)]
    if missing:
        verify_files(folder)
    for row in missing:
        append_row(run, row)
    return rows


def record_checks(named: Iterable[tuple[str | None, Model]], run: Path, listener: Listener) -> list[Row]:
    """Append the check's rows of those models, typed and as rows name them, that are folders with one.

    A check that cannot be read is a notice. The run folder has to be locked (``storage.locked``).
    """
    rows: list[Row] = []
    for folder, model in dict.fromkeys((Path(given), model) for given, model in named if given):
        if not has_check(folder):
            continue
        try:
            rows += append_check_rows(folder, model, run)
        except QwenqError as error:
            listener(Notice(f"the check of {model.name} is not shown: {error.what} ({error.where})"))
    return rows


def _check_rows(manifest: dict[str, Any], model: Model, folder: str) -> Iterator[Row]:
    """Yield KL with the errors of the modules, same top token, and perplexity as a ratio to the base's."""
    check, calibration = manifest["check"], manifest["calibration"]
    point: dict[str, Value] = {
        "text": f"held out of {calibration['source']}",
        "text_fingerprint": calibration["tokens"],
        "sequences": check["sequences"],
        "seq_len": check["seq_len"],
        "dtype": check["dtype"],
    }
    common: dict[str, Any] = {
        "n": check["tokens"],
        "implementation": manifest["made_by"],
        "settings": {"recipe": manifest["recipe"], "device": check["device"]},
        "date": date.today().isoformat(),
    }
    for metric, unit in UNITS.items():
        found = check[metric.replace(".", "_")]
        if found["value"] is None:
            reason = "not finite"
            yield Row(metric, model, point, None, unit, status="failed", reason=reason, **common)
            continue
        details: dict[str, Any] = {"command": quantize_command(manifest["recipe"], folder)}
        details |= _details_of_kl(manifest) if metric == "kl" else {}
        bounds = (found["low"], found["high"])
        yield Row(metric, model, point, found["value"], unit, *bounds, details=details, **common)


_UNSOUND = ArithmeticError, AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError


def _sound_rows(path: Path, model: Model) -> list[Row]:
    """Return the rows, once they are known to be readable: others would make the run folder unreadable."""
    try:
        rows = list(_check_rows(json.loads(path.read_text(encoding="utf-8")), model, path.parent.name))
        for row in rows:
            require_readable(row)
    except _UNSOUND as error:
        raise CorruptFileError(
            f"its check is incomplete, or not as `qwenq quantize` writes it: {error!r}", where=path
        ) from error
    return rows


def _same_row(known: Row, row: Row) -> bool:
    """Return whether a recorded row equals this one but for its date, and the command where it has one."""
    details = {**row.details, "command": known.details.get("command")}
    same = replace(row, date=known.date, details=details if details["command"] else row.details)
    return json.dumps(same.to_json(), sort_keys=True) == json.dumps(known.to_json(), sort_keys=True)


def _details_of_kl(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the modules' errors; the curve over position, if the manifest has it; bits; experts' tokens."""
    check, mixed = manifest["check"], manifest.get("mixed_bits")
    measured = [part for part in check.get("kl_by_position", []) if part["value"] is not None]
    curve = {
        "positions": [(part["first"] + part["last"]) / 2 for part in measured],
        "values": [part["value"] for part in measured],
        "counts": [part["n"] for part in measured],
        "lows": [part["low"] for part in measured],
        "highs": [part["high"] for part in measured],
    }
    bits = {key: mixed[key] for key in ("tokens", "bytes", "curve", "remaining")} if mixed else None
    return {
        "modules": check["modules"],
        **(curve if measured else {}),
        **({"mixed_bits": bits} if bits else {}),
        **({"expert_tokens": manifest["expert_tokens"]} if manifest.get("expert_tokens") else {}),
    }
