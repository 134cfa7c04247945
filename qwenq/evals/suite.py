"""Run several tasks on several models: bases first, as each quantised model is compared with its base."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenq.comparison import PLAIN
from qwenq.distributed import ALONE, Team
from qwenq.environment import MACHINE, environment, machine
from qwenq.errors import DataError, UsageError
from qwenq.evals.answer_log import FOLDER
from qwenq.evals.endpoint import RemoteModel, open_served
from qwenq.evals.model import (
    MAX_NEW_TOKENS,
    EvalModel,
    LoadOptions,
    LocalModel,
    assign_bases,
    bases_first,
    open_eval_model,
)
from qwenq.evals.rows import base_row, cut_notice, record_checks, rows_of
from qwenq.evals.run import Answers, TaskPlan, answer, answer_share, make_plan
from qwenq.evals.sandbox.run import Sandbox, find_sandbox, run_programs
from qwenq.evals.task import MAIN, DataSource, ProtocolName
from qwenq.evals.tasks.registry import get_task
from qwenq.events import Advance, Listener, Notice, Start
from qwenq.models.folders import local_path
from qwenq.models.identity import model_name
from qwenq.recipe import EvalRecipe
from qwenq.results import RESULTS_FILE, Row, append_row, read_rows, write_environment
from qwenq.storage import atomic_write_json, locked


def source_of(data: str | None, sample: bool) -> DataSource:
    """Return where the benchmarks' files come from."""
    if data is None:
        return DataSource(None, sample)
    if sample:
        raise UsageError("--data and --sample exclude each other", hint="give one of them")
    folder = local_path(data, "--data")
    if not folder.is_dir():
        raise UsageError(
            "no such folder", where=folder, hint="--data names a folder that holds mmlu/, ceval/, …"
        )
    return DataSource(folder)


def require_settings(chosen: EvalRecipe) -> None:
    """Refuse data that is not there, and numbers of tasks that are not evaluated: no model is open yet."""
    source_of(chosen.data, chosen.sample)
    for option, numbers in (("--limit", chosen.limit), ("--max-new-tokens", chosen.max_new_tokens)):
        for task in numbers if isinstance(numbers, Mapping) else ():
            if task not in chosen.tasks:
                hint = f"--tasks are {', '.join(chosen.tasks)}"
                raise UsageError(f"{task!r} is not among the tasks", where=option, hint=hint)


def plan_for(eval_model: EvalModel, plan: TaskPlan, chosen: EvalRecipe) -> TaskPlan:
    """Return the plan for this model: whether it thinks, and the limit of answers."""
    wanted = chosen.max_new_tokens
    limit = wanted.get(plan.task.name) if isinstance(wanted, Mapping) else wanted
    thinking = plan.task.protocol == "card" and bool(eval_model.thinking)
    limit = MAX_NEW_TOKENS if thinking and limit is None else limit
    return replace(plan, thinking=thinking, max_new_tokens=limit)


def run_folder(out: Path | str | None, models: Sequence[str | None], served: str | None) -> Path:
    """Return the run folder: by default it is named after the first model, or the served one."""
    name = model_name(models[0]) if served is None else served.rsplit("/", 1)[-1]
    return local_path(out if out is not None else Path("runs") / name, "--out")


def open_and_evaluate(
    models: list[str | None] | tuple[str, str | None],
    chosen: EvalRecipe,
    how: LoadOptions,
    run: Path,
    listener: Listener,
    command: str,
    team: Team,
    batch: int | None,
    *,
    unsafe_code: bool,
) -> list[Row]:
    """Open models and evaluate them; ranks but the first ask their share and return no rows.

    Models are folders or hub ids, None is the bundled model; or an address and the name of a model there.
    """
    require_settings(chosen)
    opened: list[EvalModel]
    if isinstance(models, tuple):
        url, name = models
        key = os.environ.get("OPENAI_API_KEY")
        opened = [open_served(url, name, key, how.thinking, batch, listener)]
    else:
        local = [open_eval_model(name, how) for name in models]
        for notice in dict.fromkeys(notice for one in local for notice in one.notices):
            listener(Notice(notice))
        opened = [*local]
    chats = [one for one in opened if _protocol(one, chosen) == "card"]
    if how.thinking == "on" and not chats:
        raise UsageError(
            "only the protocol card asks in chats: no model thinks under the others",
            where="--thinking",
            hint="use --protocol card, or leave --thinking out",
        )
    for notice in dict.fromkeys(one.thinking_notice for one in chats if one.thinking_notice):
        listener(Notice(notice))
    if not team.is_rank0:
        _evaluate_share(opened, chosen, run, team, batch)
        return []
    return evaluate(opened, chosen, run, listener, command, team, batch=batch, unsafe_code=unsafe_code)


def evaluate(
    eval_models: Sequence[EvalModel],
    chosen: EvalRecipe,
    run: Path,
    listener: Listener,
    command: str = "",
    team: Team = ALONE,
    *,
    batch: int | None = None,
    unsafe_code: bool = False,
) -> list[Row]:
    """Run every task on every model; return the rows, which are appended to ``run`` as they are made.

    Data and sandbox are checked before the first model is loaded. The rows of quantised models include those
    of the check that `qwenq quantize` made.

    Args:
        command: as the user typed it, for the rows.
        team: further processes that ask a share, each in ``_evaluate_share``; this one is rank 0.
        batch: rows at once; None: as many as fit.
    """
    order = bases_first(eval_models)
    plans = _plans(order, chosen)
    coded = [plan for plan in plans.values() if plan.task.needs_sandbox]
    sandbox = find_sandbox(unsafe_code) if coded else None
    rows: list[Row] = []
    here = [one for one in order if isinstance(one, LocalModel)]
    with locked(run):
        earlier = read_rows(run) if (run / RESULTS_FILE).exists() else []
        plain = [
            row.model for row in reversed(earlier) if row.metric == MAIN and row.model.precision in PLAIN
        ]
        write_environment(run, environment())
        notes = [note for plan in plans.values() for note in plan.notes]
        for line in dict.fromkeys([*assign_bases(here, plain), *notes]):
            listener(Notice(line))
        if sandbox is not None:
            for plan in coded:
                check_solutions(plan, sandbox, run, listener)
        for eval_model in order:
            if isinstance(eval_model, LocalModel) and eval_model.quantised:
                rows += record_checks([(str(eval_model.checkpoint.folder), eval_model.model)], run, listener)
            for name in chosen.tasks:
                plan = plan_for(eval_model, plans[name, _protocol(eval_model, chosen)], chosen)
                answers = answer(eval_model, plan, run, listener, batch=batch, sandbox=sandbox, team=team)
                if isinstance(eval_model, RemoteModel) and answers.recorded:
                    # the server may have got other weights under the same name
                    count = "1 answer is" if answers.recorded == 1 else f"{answers.recorded:,} answers are"
                    again = "recorded from this address already; --out NEW asks again"
                    listener(Notice(f"{count} {again}"))
                for line in cut_notice(plan, answers):
                    listener(Notice(f"{eval_model.model.label}: {line}"))
                rows += _append_rows(eval_model, plan, answers, batch, run, sandbox, command)
            eval_model.unload()
    return rows


def _evaluate_share(
    eval_models: Sequence[EvalModel], chosen: EvalRecipe, run: Path, team: Team, batch: int | None
) -> None:
    """Ask this rank's share of every task of ``evaluate``."""
    order = bases_first(eval_models)
    plans = _plans(order, chosen)
    for eval_model in order:
        for name in chosen.tasks:
            plan = plan_for(eval_model, plans[name, _protocol(eval_model, chosen)], chosen)
            answer_share(eval_model, plan, run, team, batch=batch)
        eval_model.unload()


def _protocol(eval_model: EvalModel, chosen: EvalRecipe) -> ProtocolName:
    return eval_model.protocol if chosen.protocol == "auto" else chosen.protocol


def _plans(order: Sequence[EvalModel], chosen: EvalRecipe) -> dict[tuple[str, ProtocolName], TaskPlan]:
    """Return every task under every protocol that is needed, with its items."""
    source = source_of(chosen.data, chosen.sample)
    by_task = chosen.limit if isinstance(chosen.limit, Mapping) else dict.fromkeys(chosen.tasks, chosen.limit)
    return {
        (name, protocol): make_plan(
            get_task(name, protocol), source, chosen.subjects, chosen.shots, by_task.get(name)
        )
        for protocol in dict.fromkeys(_protocol(one, chosen) for one in order)
        for name in chosen.tasks
    }


def check_solutions(plan: TaskPlan, sandbox: Sandbox, run: Path, listener: Listener) -> None:
    """Run the benchmark's own solutions, once for each run folder: if they fail, verdicts mean nothing."""
    name, program, reference = plan.task.name, plan.task.program, plan.task.reference
    if program is None or reference is None:
        raise ValueError(f"{name} has no programs")
    text = json.dumps([sandbox.implementation, [dict(item.data) for item in plan.items]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    kept = run / FOLDER / f"{name}.solutions.{digest}.json"
    if kept.exists():
        return
    listener(Start(step := f"{name}: running the benchmark's own solutions", len(plan.items), "programs"))
    began = time.monotonic()
    outcomes = run_programs(
        [program(item, reference(item)) for item in plan.items],
        sandbox=sandbox,
        on_done=lambda _, outcome: listener(Advance(step, result=outcome.passed)),
    )
    failed = [(item, o) for item, o in zip(plan.items, outcomes, strict=True) if not o.passed]
    if failed:
        item, outcome = failed[0]
        found = f"{len(failed)} of {len(plan.items)} solutions of the benchmark itself fail"
        why = f"{outcome.reason}: {outcome.detail}"
        if len(failed) > min(plan.task.spare, len(plan.items) // 2):
            raise DataError(
                f"{found} ({why}): the data or this sandbox ({sandbox.implementation}) is broken",
                where=item.id,
            )
        ids = ", ".join(item.id for item, _ in failed)
        listener(Notice(f"{name}: {found}, so no answer can: {ids} (the first: {why})"))
    passed, seconds = len(outcomes) - len(failed), round(time.monotonic() - began, 1)
    atomic_write_json(kept, {"sandbox": sandbox.implementation, "passed": passed, "seconds": seconds})
    all_ = "all " if not failed else ""
    found = f"{all_}{passed} of the benchmark's own solutions pass, in {seconds:.0f} s"
    listener(Notice(f"{name}: {found}; {sandbox.implementation}"))


def _append_rows(
    eval_model: EvalModel,
    plan: TaskPlan,
    answers: Answers,
    batch: int | None,
    run: Path,
    sandbox: Sandbox | None,
    command: str,
) -> list[Row]:
    settings: dict[str, Any] = {
        **eval_model.settings,
        "generation": eval_model.generation(plan.thinking),
        "asked": "generation" if answers.written else "logits",
        MACHINE: machine(environment()),
    }
    if plan.task.protocol == "card" and eval_model.thinking is not None:
        settings["thinking"] = "on" if eval_model.thinking else "off"
    if not answers.recorded:  # records do not hold the batch size
        served = eval_model.concurrency if isinstance(eval_model, RemoteModel) else None
        settings["batch"] = served or batch or "auto"
    if plan.task.needs_sandbox and sandbox is not None:
        settings["sandbox"] = "; ".join(answers.sandboxes) or sandbox.implementation
    rows = rows_of(eval_model, plan, answers, base_row(run, eval_model, plan), settings, command)
    for row in rows:
        append_row(run, row)
    return rows
