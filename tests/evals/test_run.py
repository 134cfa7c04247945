"""A model through a task: asked once, recorded, gone on with, and the same in every batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evals.benchmark_data import write_gsm8k, write_humaneval, write_mmlu
from evals.test_task_bbh import write_bbh
from evals.test_task_cmmlu import write_cmmlu
from evals.test_task_math import write_math
from evals.test_task_mbpp import write_mbpp
from tiny_model import write_tiny_model

from qwenq import stopping
from qwenq.errors import DataError, ModelError, UnsupportedError
from qwenq.evals import answering
from qwenq.evals.model import LoadOptions, LocalModel, open_eval_model
from qwenq.evals.rows import base_row, rows_of, verdicts
from qwenq.evals.run import Answers, TaskPlan, answer, make_plan
from qwenq.evals.sandbox.run import find_sandbox
from qwenq.evals.task import DataSource, Judgement
from qwenq.evals.tasks.registry import get_task
from qwenq.events import Advance, Event, Notice, Start
from qwenq.results import Row, append_row

FLOAT32 = LoadOptions(device="cpu", dtype="float32")


class Silent:
    """Counts the items and programs that it is told of, and keeps notices."""

    def __init__(self, said: list[str] | None = None) -> None:
        self.recorded = self.asked = self.programs = 0
        self.said = [] if said is None else said

    def __call__(self, event: Event) -> None:
        match event:
            case Start(done=done):
                self.recorded += done
            case Advance(step) if "running" in step:
                self.programs += 1
            case Advance():
                self.asked += 1
            case Notice(text):
                self.said.append(text)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("run") / "Tiny", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_humaneval(write_gsm8k(write_mmlu(tmp_path_factory.mktemp("data"))))


@pytest.fixture
def eval_model(tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalModel:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return open_eval_model(str(tiny), FLOAT32)


def plan_of(
    data: Path, name: str, protocol: str, limit: int, subjects: tuple[str, ...] = (), shots: int | None = None
) -> TaskPlan:
    return make_plan(get_task(name, protocol), DataSource(data), subjects, shots, limit)


def mmlu(data: Path, limit: int = 8) -> TaskPlan:
    return plan_of(data, "mmlu", "base", limit, ("abstract_algebra", "astronomy"))


def ask(eval_model: LocalModel, plan: TaskPlan, run: Path, **options: Any) -> tuple[Answers, Silent]:
    listener = Silent()
    return answer(eval_model, plan, run, listener, **options), listener


def short(plan: TaskPlan, tokens: int = 12) -> TaskPlan:
    """The same task with answers of so many tokens at most."""
    return replace(plan, task=replace(plan.task, max_new_tokens=tokens))


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_do_not_depend_on_the_batch(
    batch: int, eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    for plan in (mmlu(data), short(plan_of(data, "gsm8k", "card", 9))):
        one, _ = ask(eval_model, plan, tmp_path / "fixed", batch=batch)
        auto, _ = ask(eval_model, plan, tmp_path / "auto")
        assert one.judged == auto.judged


def test_a_complete_run_does_not_load_the_model_again(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    first, listener = ask(eval_model, mmlu(data), tmp_path)
    assert (listener.recorded, listener.asked) == (0, 16)
    eval_model.unload()
    again, listener = ask(eval_model, mmlu(data), tmp_path)
    assert (listener.recorded, listener.asked) == (16, 0)
    assert again.judged == first.judged
    assert again.implementations == first.implementations
    assert "engine" not in vars(eval_model)


def test_sigterm_finishes_and_records_the_batch_in_progress(
    eval_model: LocalModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, choose, batches = mmlu(data), answering._choose, []

    def told(engine: Any, requests: Any, *rest: Any) -> Any:
        batches.append(len(requests))
        if len(batches) == 3:
            assert stopping.note() == "the items under way are recorded"
        return choose(engine, requests, *rest)

    monkeypatch.setattr(answering, "_choose", told)
    with pytest.raises(stopping.Terminated):
        ask(eval_model, plan, tmp_path, batch=4)
    assert len(batches) == 3 < len(plan.items) / 4
    _, listener = ask(eval_model, plan, tmp_path, batch=4)
    assert (listener.recorded, listener.asked) == (sum(batches[:3]), len(plan.items) - sum(batches[:3]))


def test_more_items_are_added_to_those_there_are(eval_model: LocalModel, data: Path, tmp_path: Path) -> None:
    ask(eval_model, mmlu(data, 3), tmp_path)
    more, listener = ask(eval_model, mmlu(data, 5), tmp_path)
    assert (listener.recorded, listener.asked) == (6, 4)
    fresh, _ = ask(eval_model, mmlu(data, 5), tmp_path / "fresh")
    assert more.judged == fresh.judged


def test_records_survive_a_run_on_other_data(eval_model: LocalModel, data: Path, tmp_path: Path) -> None:
    plan = mmlu(data, 2)
    first = plan.items[0]
    other = replace(plan, items=[replace(first, data={**first.data, "A": "9"})])
    for asked, count in ((plan, 4), (other, 1), (plan, 0), (other, 0)):
        assert ask(eval_model, asked, tmp_path)[1].asked == count


def test_another_answer_key_is_another_question(eval_model: LocalModel, data: Path, tmp_path: Path) -> None:
    plan = mmlu(data, 3)
    ask(eval_model, plan, tmp_path)
    first = plan.items[0]
    corrected = replace(first, data={**first.data, "answer": "B" if first.data["answer"] == "A" else "A"})
    _, listener = ask(eval_model, replace(plan, items=[corrected, *plan.items[1:]]), tmp_path)
    assert (listener.recorded, listener.asked) == (5, 1)


def test_other_ways_to_run_are_recorded_apart(eval_model: LocalModel, data: Path, tmp_path: Path) -> None:
    ask(eval_model, mmlu(data, 2), tmp_path)
    other = open_eval_model(str(eval_model.checkpoint.folder), LoadOptions(device="cpu", dtype="bfloat16"))
    _, listener = ask(other, mmlu(data, 2), tmp_path)
    assert listener.asked == 4


def test_prompts_too_long_for_the_model_are_refused_before_any_is_asked(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    eval_model.engine.context = 150
    with pytest.raises(DataError, match=r"16 of 16 prompts are too long .* takes 150 tokens") as caught:
        ask(eval_model, mmlu(data), tmp_path)
    assert caught.value.hint and "--shots" in caught.value.hint
    eval_model.unload()
    _, listener = ask(eval_model, mmlu(data), tmp_path)
    assert listener.recorded == 0


def test_after_nan_only_sound_answers_are_recorded(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    engine: Any = eval_model.engine
    prefill, calls = engine.prefill, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        found: torch.Tensor = prefill(*arguments)
        return found * float("nan") if calls > 3 else found

    engine.prefill = failing
    with pytest.raises(ModelError, match="not finite"):
        ask(eval_model, mmlu(data), tmp_path, batch=4)
    eval_model.unload()
    found, listener = ask(eval_model, mmlu(data), tmp_path)
    assert listener.recorded in (4, 8)
    fresh, _ = ask(eval_model, mmlu(data), tmp_path / "fresh")
    assert found.judged == fresh.judged


def test_no_items_and_doubled_ids_are_refused(data: Path) -> None:
    script = get_task("mmlu", "base")
    none = replace(script, load=lambda *_: [])
    with pytest.raises(DataError, match="no item"):
        make_plan(none, DataSource(data), (), None, None)
    (item,) = make_plan(script, DataSource(data), ("astronomy",), None, 1).items
    with pytest.raises(DataError, match="occurs twice"):
        make_plan(replace(script, load=lambda *_: [item, item]), DataSource(data), (), None, None)


def test_programs_are_run_once_and_the_verdict_is_the_sandboxs(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    try:
        sandbox = find_sandbox()
    except UnsupportedError as error:
        pytest.skip(error.what)
    plan = short(plan_of(data, "humaneval", "base", 3), 6)
    script: Any = plan.task

    def solved(item: Any, _: Any) -> Judgement:
        """The second problem is solved, whatever the model wrote."""
        right = item.id == "HumanEval/1"
        return Judgement(False, item.data["canonical_solution"] if right else "    return None\n")

    plan = replace(plan, task=replace(script, judge=solved))
    found, listener = ask(eval_model, plan, tmp_path, sandbox=sandbox)
    assert [judgement.correct for _, judgement in found.judged] == [False, True, False]
    assert listener.programs == 3
    again, listener = ask(eval_model, plan, tmp_path, sandbox=sandbox)
    assert (listener.programs, again.judged) == (0, found.judged)


def test_rows_hold_the_interval_the_items_and_the_comparison(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    plan = mmlu(data)
    answers, _ = ask(eval_model, plan, tmp_path)
    main, published = rows_of(eval_model, plan, answers, None, {"dtype": "float32"})
    assert (main.metric, published.metric) == ("accuracy", "accuracy.published")
    assert main.value is not None and main.low is not None and main.high is not None
    assert main.low <= main.value <= main.high
    assert main.n == 16
    assert main.details["items"] == verdicts(answers.judged)
    assert main.details["parts"].keys() == {"abstract_algebra", "astronomy"}
    assert main.point["limit"] == 8
    assert "items" not in published.details
    append_row(tmp_path, main)

    quantised = replace(
        eval_model,
        model=replace(eval_model.model, precision="int4", fingerprint="other"),
        base=eval_model.model.fingerprint,
    )
    in_bfloat16 = replace(quantised, how=replace(quantised.how, dtype="bfloat16"))
    quantised.checkpoint.config["quantization_config"] = {"bits": 4}
    try:
        assert isinstance(base_row(tmp_path, quantised, mmlu(data, 5)), str)
        later = replace(main, model=replace(main.model, precision="bf16"), details={"items": {"x": True}})
        append_row(tmp_path, later)
        base = base_row(tmp_path, quantised, plan)
        assert isinstance(base, Row) and base.model.precision == "fp32", "it ran in float32, too"
        assert base_row(tmp_path, replace(quantised, base="of other weights"), plan) is None
        assert base_row(tmp_path, replace(quantised, base=None), plan) is None
        (other, _) = rows_of(quantised, plan, answers, base_row(tmp_path, in_bfloat16, plan), {})
        assert base.details["items"] == verdicts(answers.judged)
        worse = replace(
            answers, judged=[(item, replace(verdict, correct=False)) for item, verdict in answers.judged]
        )
        (row, _) = rows_of(quantised, plan, worse, replace(base, value=0.9), {})
    finally:
        del quantised.checkpoint.config["quantization_config"]
    assert row.details["paired"]["lost"] == sum(verdicts(answers.judged).values())
    assert row.details["paired"]["won"] == 0
    assert row.details["paired"]["base"] == "fp32"
    assert row.details["base"] == eval_model.model.fingerprint, "reports take no other"
    assert row.details["paired"]["change"] == pytest.approx(0.0 - 0.9), "of the scores, as reports have it"
    assert "paired" not in other.details
    assert other.details["unpaired"] == "other items: 17 of 17 are in one of the two only"


def test_every_task_has_rows_that_reports_and_comparisons_find(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    plan = short(plan_of(data, "humaneval", "base", 2), 4)
    judged = [(item, Judgement(place == 0, "")) for place, item in enumerate(plan.items)]
    (row,) = rows_of(eval_model, plan, Answers(judged, ("here",), 0), None, {})
    assert (row.metric, row.value, row.n) == ("accuracy", 0.5, 2)


def test_the_base_cards_other_tasks_run_through_the_same_machinery(
    eval_model: LocalModel, tmp_path: Path
) -> None:
    for write, name, subjects in (
        (write_cmmlu, "cmmlu", ("agronomy",)),
        (write_math, "math", ("counting_and_probability",)),
        (write_bbh, "bbh", ("snarks",)),
    ):
        plan = plan_of(write(tmp_path).folder or tmp_path, name, "base", 2, subjects)
        plan = plan if name == "cmmlu" else short(plan, 4)
        found, listener = ask(eval_model, plan, tmp_path / "run")
        row = rows_of(eval_model, plan, found, None, {})[0]
        assert (row.metric, row.n, listener.asked) == ("accuracy", 2, 2)
        assert ask(eval_model, plan, tmp_path / "run")[1].asked == 0
    try:
        sandbox = find_sandbox()
    except UnsupportedError as error:
        pytest.skip(error.what)
    plan = short(plan_of(write_mbpp(tmp_path).folder or tmp_path, "mbpp", "base", 2), 4)
    found, listener = ask(eval_model, plan, tmp_path / "run", sandbox=sandbox)
    assert (listener.programs, len(found.judged)) == (2, 2)


def test_a_base_with_other_settings_is_not_compared(
    eval_model: LocalModel, data: Path, tmp_path: Path
) -> None:
    """Under the same ids, because the data has changed; or at another point, which is said."""
    plan = mmlu(data, 3)
    answers, _ = ask(eval_model, plan, tmp_path)
    base = rows_of(eval_model, plan, answers, None, {})[0]
    append_row(tmp_path, base)
    int4 = replace(eval_model, base=eval_model.model.fingerprint)
    assert "paired" in rows_of(int4, plan, answers, base_row(tmp_path, int4, plan), {})[0].details
    first = plan.items[0]
    changed = replace(plan, items=[replace(first, data={**first.data, "A": "9"}), *plan.items[1:]])
    other, _ = ask(eval_model, changed, tmp_path)
    row = rows_of(int4, changed, other, base_row(tmp_path, int4, changed), {})[0]
    assert row.details["unpaired"] == "other questions under the same ids: the data has changed"
    assert "paired" not in row.details

    assert base_row(tmp_path, eval_model, mmlu(data, 5)) is None
    assert base_row(tmp_path, int4, plan_of(data, "gsm8k", "card", 3)) is None
    why = base_row(tmp_path, int4, mmlu(data, 5))
    assert why == "its base was evaluated with another limit: evaluate both alike"
    assert rows_of(int4, plan, answers, why, {})[0].details["unpaired"] == why


def test_verdicts_name_the_sandbox_that_ran_them(eval_model: LocalModel, data: Path, tmp_path: Path) -> None:
    plan, unsafe = short(plan_of(data, "humaneval", "base", 1), 2), find_sandbox(unsafe=True)
    script: Any = plan.task
    solved = replace(script, judge=lambda item, _: Judgement(False, item.data["canonical_solution"]))
    plan = replace(plan, task=solved)
    for sandbox in (unsafe, replace(unsafe, implementation="a real one")):
        assert ask(eval_model, plan, tmp_path, sandbox=sandbox)[0].sandboxes == (unsafe.implementation,)


def test_default_shots_given_or_not_are_the_same_question(data: Path) -> None:
    """The protocol's own number of examples; subjects where a task has none, which is said."""
    assert plan_of(data, "mmlu", "base", 1, ("astronomy",), 5).shots is None
    assert plan_of(data, "mmlu", "base", 1, ("astronomy",), 4).shots == 4
    plan = plan_of(data, "gsm8k", "card", 2, ("astronomy",))
    assert (plan.subjects, len(plan.items)) == ((), 2)
    assert plan.notes == ("gsm8k has no subjects: all of its questions are asked",)
