"""Shared prefixes and batches change nothing: every answer is that of the whole prompt on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from runtime.small_models import VOCAB, random_ids, small_model

from qwenq.errors import ModelError, QwenqError
from qwenq.evals.answering import score_choices
from qwenq.evals.batching import Budget, ChoiceTokens, budget_for
from qwenq.evals.task import Chosen
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import Engine, load


def engine(dtype: torch.dtype = torch.float32, family: str = "qwen2-tied") -> Any:
    return load(small_model(family)[1], device="cpu", dtype=dtype)


def questions(count: int = 12) -> list[ChoiceTokens]:
    """Two subjects with headers, questions of several lengths, choices of one, two and three tokens."""
    headers = [random_ids(150, seed=1), random_ids(130, seed=2)]
    found = []
    for number in range(count):
        prompt = headers[number % 2] + random_ids(3 + 7 * number % 23, seed=10 + number)
        third: tuple[int, ...] = (7, 8, 9) if number % 3 == 0 else (7,)
        found.append(ChoiceTokens(f"item {number}", tuple(prompt), ((5,), (6,), third, (8, 1))))
    return found


def whole(runner: Engine, question: ChoiceTokens) -> list[float]:
    """Log-probability of each choice from one plain pass over prompt and choice."""
    found = []
    for choice in question.choices:
        ids = [*question.prompt, *choice]
        (logits,) = runner.logits([ids])
        logs = logits.log_softmax(-1)
        places = range(len(question.prompt) - 1, len(ids) - 1)
        found.append(sum(float(logs[place, ids[place + 1]]) for place in places))
    return found


def answers(runner: Engine, asked: Sequence[ChoiceTokens], batch: int | None) -> list[Chosen]:
    found = dict(one for batch_ in score_choices(runner, asked, budget_for(runner, batch)) for one in batch_)
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))]


@pytest.mark.parametrize("batch", [1, 4, None])
def test_scores_are_those_of_the_whole_prompt(batch: int | None) -> None:
    runner, asked = engine(), questions()
    for question, answer in zip(asked, answers(runner, asked, batch), strict=True):
        assert answer.logprobs == pytest.approx(whole(runner, question), abs=1e-4)


def test_the_shared_part_is_computed_once() -> None:
    runner, asked = engine(), questions()
    fed = 0
    plain = runner.forward

    def counted(ids: torch.Tensor, counts: Sequence[int], cache: KVCache) -> torch.Tensor:
        nonlocal fed
        fed += sum(counts)
        hidden: torch.Tensor = plain(ids, counts, cache)
        return hidden

    runner.forward = counted
    answers(runner, asked, None)
    continuations = sum(len(choice) - 1 for question in asked for choice in question.choices)
    tails = sum(len(question.prompt) for question in asked) - 6 * (150 + 130)
    assert fed == 150 + 130 + tails + continuations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_is_the_double_softmax_in_the_models_dtype(dtype: torch.dtype) -> None:
    runner = engine(dtype)
    asked = [ChoiceTokens("x", tuple(random_ids(20)), ((5,), (6,), (7,), (8,)))]
    (answer,) = answers(runner, asked, 1)
    logits = runner.prefill([asked[0].prompt], runner.new_cache(1, 20))[0].to(dtype)
    expected = logits.softmax(-1)[[5, 6, 7, 8]].softmax(-1)
    assert answer.published == tuple(expected.float().tolist())


def test_near_options_tie_in_bfloat16() -> None:
    """The trap of the published scripts: .300 and .306 become equal, and the first letter wins."""
    logits = torch.full((1, VOCAB), -30.0)
    logits[0, [5, 6, 7, 8]] = torch.tensor([0.300, 0.306, 0.2, 0.19]).log()
    runner = fixed(logits, torch.bfloat16)
    (answer,) = answers(runner, [ChoiceTokens("x", (1, 2), ((5,), (6,), (7,), (8,)))], 1)
    assert answer.published[0] == answer.published[1] == max(answer.published)
    assert max(range(4), key=answer.logprobs.__getitem__) == 1


def fixed(logits: torch.Tensor, dtype: torch.dtype) -> Any:
    """Gives the same logits behind every prompt."""
    runner = engine(dtype)
    runner.prefill = lambda prompts, *_: logits.expand(len(prompts), -1)
    return runner


def test_nan_is_an_error_that_names_the_item() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = float("nan")
    with pytest.raises(ModelError, match="not finite") as caught:
        answers(fixed(logits, torch.float32), questions(4), None)
    assert caught.value.where and caught.value.where.startswith("item item ")


def narrow(rows: int) -> Any:
    """Has memory for so many rows."""
    runner = engine()
    plain = runner.prefill

    def prefill(prompts: Sequence[Sequence[int]], cache: KVCache) -> torch.Tensor:
        if len(prompts) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        found: torch.Tensor = plain(prompts, cache)
        return found

    runner.prefill = prefill
    return runner


def test_out_of_memory_halves_the_batch() -> None:
    asked = questions()
    found = answers(narrow(2), asked, 6)
    assert [answer.logprobs for answer in found] == [
        pytest.approx(answer.logprobs, abs=1e-5) for answer in answers(engine(), asked, None)
    ]
    with pytest.raises(QwenqError, match="single prompt"):
        answers(narrow(0), [ChoiceTokens("x", (1, 2), ((5,),))], None)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("expected scalar type Float")

    runner = engine()
    runner.prefill = broken
    with pytest.raises(RuntimeError, match="scalar"):
        answers(runner, questions(2), None)


def test_the_budget_bounds_rows_by_memory_tokens_and_wish() -> None:
    budget = Budget(memory=1000, tokens=64, rows=100, cached=1, computed=0, logits=0)
    assert budget.rows_that_fit(longest=4, capacity=10) == 1000 // (10 + 4 * 40)
    assert Budget(10**9, 64, 100, 1, 0, 0).rows_that_fit(4, 10) == 16
    assert Budget(10**9, 10**9, 3, 1, 0, 0).rows_that_fit(4, 10) == 3
    assert Budget(1, 1, 9, 1, 1, 1).rows_that_fit(400, 10) == 1
