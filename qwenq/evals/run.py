"""Run one task on one model: ask what is not recorded yet, record each answer, return all verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenq.distributed import ALONE, Team
from qwenq.errors import DataError, StorageError
from qwenq.evals.answer_log import AnswerLog, AnswerRecord
from qwenq.evals.batching import prompt_text, questions_hash, request_hash
from qwenq.evals.endpoint import Reply
from qwenq.evals.model import EvalModel
from qwenq.evals.sandbox.run import Outcome, Program, Sandbox, run_programs
from qwenq.evals.task import Choose, Chosen, DataSource, Item, Judgement, Request, Task, Written, final_answer
from qwenq.events import Advance, Finish, Listener, Start, silent
from qwenq.stopping import finishing


@dataclass(frozen=True)
class TaskPlan:
    """A task's items with the settings that a model is asked with."""

    task: Task  # a benchmark under a protocol
    items: Sequence[Item]  # in their order; at least one
    shots: int | None = None  # number of examples; None: the protocol's default, given or not
    limit: int | None = None  # items of each subject at most; None: all, also where the limit was larger
    subjects: tuple[str, ...] = ()  # only these; empty: all
    source: DataSource = field(default_factory=DataSource)  # of the items
    notes: tuple[str, ...] = ()  # notices for the user
    max_new_tokens: int | None = None  # the limit of written answers; None: the protocol's own
    # whether the model thinks before it answers; the text behind its thoughts is judged
    thinking: bool = False

    def request(self, item: Item) -> Request:
        """Return the request for an item, with this plan's limit."""
        return self.task.request(item, self.max_new_tokens)


@dataclass(frozen=True)
class Answers:
    """All verdicts of a model on a task."""

    judged: list[tuple[Item, Judgement]]  # in the order of the items
    implementations: tuple[str, ...]  # code that ran, each once; several where a run was continued elsewhere
    recorded: int  # items that were not asked again
    questions: str = ""  # a hash of all requests, the same for every model; empty: unknown
    sandboxes: tuple[str, ...] = ()  # that programs ran in, each once
    cut: int = 0  # written answers that reached their limit of tokens before they ended
    written: int = 0  # generated answers; the others are letters scored by logits


def make_plan(
    task: Task, source: DataSource, subjects: Sequence[str], shots: int | None, limit: int | None
) -> TaskPlan:
    """Load and validate the items: of each subject the first ``limit``."""
    counts: dict[str | None, int] = defaultdict(int)
    items: dict[str, Item] = {}
    cut = False
    for item in task.items(source, subjects, shots):
        counts[item.subject] += 1
        if limit is not None and counts[item.subject] > limit:
            cut = True
            continue
        if item.id in items:
            raise DataError(f"the id {item.id} occurs twice", where=task.name)
        items[item.id] = item
    if not items:
        raise DataError("there is no item to ask", where=task.name)
    kept = list(items.values())
    notes = list(task.notes(kept))
    if subjects and all(item.subject is None for item in kept):
        notes.append(f"{task.name} has no subjects: all of its questions are asked")
        subjects = ()
    own = None if shots == task.shots else shots  # given or not, it is the same question
    return TaskPlan(task, kept, own, limit if cut else None, tuple(subjects), source, tuple(notes))


def answer(
    eval_model: EvalModel,
    plan: TaskPlan,
    run: Path,
    listener: Listener,
    *,
    batch: int | None = None,
    sandbox: Sandbox | None = None,
    team: Team = ALONE,
) -> Answers:
    """Ask a model every item that its records do not answer yet.

    Args:
        run: the run folder, which has to be locked (``storage.locked``).
        batch: rows at once; None: what fits.
        sandbox: runs the programs of tasks that need it.
        team: further processes that ask a share, each in ``answer_share``; this one is rank 0.
    """
    if plan.task.needs_sandbox and sandbox is None:
        raise ValueError(f"{plan.task.name} needs a sandbox")
    hashes = {item.id: request_hash(item, plan.request(item)) for item in plan.items}
    with _log(eval_model, plan, run, team) as records:
        records.merge_ranks()
        open_ = [item for item in plan.items if records.find(item.id, hashes[item.id]) is None]
        step = step_name(eval_model, plan)
        listener(Start(step, len(plan.items), "items", len(plan.items) - len(open_)))
        team.broadcast_object([item.id for item in open_])
        _ask(eval_model, plan, open_, records, listener, batch, team)
        team.barrier()
        for record in records.merge_ranks():
            listener(Advance(step, result=record.correct))
        found = _all(records, hashes, run)
        if sandbox is not None and plan.task.program is not None:
            _run_pending(plan.task.program, plan.items, found, records, sandbox, listener, step)
            found = _all(records, hashes, run)
    listener(Finish(step))
    return _answers_of(plan.items, found, len(plan.items) - len(open_), questions_hash(hashes))


def step_name(eval_model: EvalModel, plan: TaskPlan) -> str:
    """Return the name of a model's way through a task, for progress."""
    return f"{eval_model.model.label}, {plan.task.name}"


def answer_share(
    eval_model: EvalModel, plan: TaskPlan, run: Path, team: Team, *, batch: int | None = None
) -> None:
    """Ask this rank's share of the items of ``answer``, and leave the records for rank 0."""
    wanted = set(team.broadcast_object())
    open_ = [item for item in plan.items if item.id in wanted]
    with _log(eval_model, plan, run, team) as records:
        _ask(eval_model, plan, open_, records, silent, batch, team)
    team.barrier()


def _ask(
    eval_model: EvalModel,
    plan: TaskPlan,
    items: Sequence[Item],
    records: AnswerLog,
    listener: Listener,
    batch: int | None,
    team: Team,
) -> None:
    """Ask this rank's share of these items, and record each answer."""
    requests = [plan.request(item) for item in items]
    costliest_first = sorted(range(len(items)), key=lambda index: -cost(requests[index]))
    share = sorted(costliest_first[team.rank :: team.world])
    mine, requests = [items[index] for index in share], [requests[index] for index in share]
    if not mine:
        return
    replies = eval_model.respond(mine, requests, batch, plan.thinking)
    with finishing("the items under way are recorded"):
        for together in replies:
            made = [_judged(plan, mine[index], requests[index], reply) for index, reply in together]
            records.append(*made)
            for record in made:
                listener(Advance(step_name(eval_model, plan), result=record.correct))


CHARACTERS_A_TOKEN = 4  # roughly: shares need not be exact
DECODE_COST = 8  # a new token, in tokens of a prompt: these go through the model together


def cost(request: Request) -> int:
    """Return the rough cost of a request, in tokens of a prompt."""
    prompt = len(prompt_text(request.prompt)) // CHARACTERS_A_TOKEN
    return prompt + (
        len(request.choices) if isinstance(request, Choose) else DECODE_COST * request.max_new_tokens
    )


def _judged(plan: TaskPlan, item: Item, request: Request, reply: Reply) -> AnswerRecord:
    """Judge an answer; without a verdict where the sandbox gives it.

    A chat model's thoughts are recorded, but not judged.
    """
    found = reply.answer
    if isinstance(found, Written) and not isinstance(request.prompt, str):
        found = replace(found, text=final_answer(found, plan.thinking))
    judgement = plan.task.judge(item, found)
    record = AnswerRecord(
        id=item.id,
        subject=item.subject,
        asked=request_hash(item, request),
        prompt_tokens=reply.prompt_tokens,
        implementation=reply.how,
        extracted=judgement.extracted,
        correct=None if plan.task.needs_sandbox else judgement.correct,
        also=dict(judgement.also),
        note=judgement.note,
    )
    if isinstance(reply.answer, Chosen):
        return replace(record, logprobs=reply.answer.logprobs, published=reply.answer.published)
    written = reply.answer
    return replace(record, output=written.text, tokens=written.tokens, stopped=written.stopped)


def answer_log_key(eval_model: EvalModel, plan: TaskPlan) -> dict[str, object]:
    """Return everything that an answer depends on but the item, which has a separate hash."""
    task = plan.task
    return {
        **eval_model.key,
        "task": task.name,
        "protocol": task.protocol,
        "version": task.version,
        "shots": plan.shots,
        "sampling": eval_model.generation(True) if plan.thinking else "greedy",
        **({"max_new_tokens": plan.max_new_tokens} if plan.max_new_tokens is not None else {}),
        **({"thinking": True} if plan.thinking else {}),
    }


def _log(eval_model: EvalModel, plan: TaskPlan, run: Path, team: Team) -> AnswerLog:
    model, task = eval_model.model, plan.task
    title = f"{model.name}.{model.precision}.{task.name}.{task.protocol}"
    return AnswerLog(run, title, answer_log_key(eval_model, plan), team.rank)


def _run_pending(
    program: Callable[[Item, str], Program],
    items: Sequence[Item],
    found: Sequence[AnswerRecord],
    records: AnswerLog,
    sandbox: Sandbox,
    listener: Listener,
    step: str,
) -> None:
    """Run the programs that have no verdict yet, and record their verdicts."""
    pending = {
        record.id: (record, program(item, record.extracted or ""))
        for item, record in zip(items, found, strict=True)
        if record.correct is None
    }
    if not pending:
        return

    def done(ended: Program, outcome: Outcome) -> None:
        note = outcome.reason + (f": {outcome.detail}" if outcome.detail else "")
        asked, ran = pending[ended.id][0], sandbox.implementation
        records.append(replace(asked, correct=outcome.passed, note=note, sandbox=ran))
        listener(Advance(step, result=outcome.passed))

    step = f"{step}: running programs"
    listener(Start(step, len(pending), "programs"))
    run_programs([one for _, one in pending.values()], sandbox=sandbox, on_done=done)


def _all(records: AnswerLog, hashes: Mapping[str, str], run: Path) -> list[AnswerRecord]:
    """Return the records of all items; refuse a run folder that the ranks do not share."""
    found = [record for id_, asked in hashes.items() if (record := records.find(id_, asked)) is not None]
    if missing := len(hashes) - len(found):
        raise StorageError(
            f"{missing} answers of other processes are missing",
            where=run,
            hint="name a run folder with --out on a disk that all machines share",
        )
    return found


def _answers_of(
    items: Sequence[Item], found: Sequence[AnswerRecord], recorded: int, questions: str
) -> Answers:
    written = [record for record in found if record.output is not None]
    return Answers(
        judged=[
            (item, Judgement(bool(record.correct), record.extracted, record.also, record.note))
            for item, record in zip(items, found, strict=True)
        ],
        implementations=tuple(dict.fromkeys(record.implementation for record in found)),
        recorded=recorded,
        questions=questions,
        sandboxes=tuple(dict.fromkeys(record.sandbox for record in found if record.sandbox)),
        cut=sum(not record.stopped for record in written),
        written=len(written),
    )
