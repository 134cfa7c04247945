"""What engines check before they run: prompts, tokens of a step, and whose cache it is."""

from __future__ import annotations

import pytest
import torch
from runtime.small_models import random_ids, small_model

from qwenq.errors import OutOfMemoryError, UsageError
from qwenq.runtime import generation
from qwenq.runtime.chat import Session
from qwenq.runtime.engine import Engine, load
from qwenq.runtime.sampling import Sampling


@pytest.fixture(scope="module", params=["fast", "transformers"])
def runner(request: pytest.FixtureRequest) -> Engine:
    return load(small_model("qwen2-tied")[1], device="cpu", dtype="float32", engine=request.param)


def test_an_empty_list_of_prompts_is_refused(runner: Engine) -> None:
    assert runner.generate([], 5).answers == []
    for run in (runner.prefill, runner.logits):
        with pytest.raises(UsageError, match="no prompt to run"):
            run([], runner.new_cache(0, 8))  # type: ignore[operator]


def test_one_empty_prompt_among_others_is_named(runner: Engine) -> None:
    with pytest.raises(UsageError, match="an empty prompt") as caught:
        runner.generate([random_ids(3), []], 4)
    assert caught.value.where == "prompt 1"


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2, 3], r"shape \[3\] are not one for each of 2 rows"),
        ([[1], [2]], r"shape \[2, 1\] are not one"),
        ([1, 300], "ids run from 1 to 300, the model knows 0 … 299"),
        ([-1, 4], "ids run from -1 to 4"),
    ],
)
def test_a_step_takes_one_known_id_a_row(runner: Engine, tokens: list, says: str) -> None:
    cache = runner.new_cache(2, 9)
    runner.prefill([random_ids(3)] * 2, cache)
    with pytest.raises(UsageError, match=says):
        runner.decode(torch.tensor(tokens), cache)
    assert cache.lengths == [3, 3]


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("qwen2-tied", "bfloat16")])
def test_the_cache_of_another_model_is_refused(runner: Engine, family: str, dtype: str) -> None:
    other = load(small_model(family)[1], device="cpu", dtype=dtype)
    cache = other.new_cache(1, 9)
    with pytest.raises(UsageError, match="is of another model") as caught:
        runner.prefill([random_ids(3)], cache)
    assert "new_cache of the same engine" in str(caught.value.hint)
    other.prefill([random_ids(3)], cache)
    with pytest.raises(UsageError, match="is of another model"):
        runner.decode(torch.tensor([1]), cache)


def test_stop_ids_that_are_not_in_the_vocabulary_stop_nothing(runner: Engine) -> None:
    prompt, strange = random_ids(5), [10**9, -3, 2**70]
    free = runner.generate([prompt], 6).answers
    assert runner.generate([prompt], 6, stop_ids=strange).answers == free
    assert runner.generate([prompt], 6, stop_ids=strange, exact_tokens=True).answers == free


def test_a_temperature_of_almost_0_is_greedy(runner: Engine) -> None:
    prompt = random_ids(5)
    cold = runner.generate([prompt], 6, sampling=Sampling(temperature=1e-300)).answers
    assert cold == runner.generate([prompt], 6).answers


@pytest.mark.parametrize("real", [0, -3])
def test_a_vocabulary_without_ids_is_refused(real: int) -> None:
    with pytest.raises(UsageError, match=f"a vocabulary of {real} ids"):
        load(small_model("llama")[1], device="cpu", dtype="float32", real_vocab=real)


def test_a_session_needs_a_prompt_and_a_token_to_answer(runner: Engine) -> None:
    session = Session(runner)
    with pytest.raises(UsageError, match="an empty prompt"):
        list(session.answer([], 5))
    with pytest.raises(UsageError, match="0 new tokens are none"):
        list(session.answer(random_ids(4), 0))


def test_out_of_memory_in_a_step_is_explained(runner: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")

    cache = runner.new_cache(1, 9)
    runner.prefill([random_ids(3)], cache)
    monkeypatch.setattr(generation, "checked", refuse)
    with pytest.raises(
        OutOfMemoryError, match=r"a decode step of 1 rows of up to .* tokens: out of memory"
    ) as caught:
        runner.decode(torch.tensor([1]), cache)
    assert "2.00 GiB more were asked for" in str(caught.value)
    assert "--max-new-tokens" in str(caught.value.hint)
