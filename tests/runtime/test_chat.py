"""Conversations: what the model is given, what the cache saves, and what reaches the screen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runtime.small_chat import REAL_VOCAB, write_chat_folder

from qwenq.errors import UsageError
from qwenq.models.chatml import build_context
from qwenq.models.qwen_tokenizer import QwenTokenizer
from qwenq.models.tokenizer import load_tokenizer
from qwenq.runtime.chat import Conversation, Session, printable
from qwenq.runtime.engine import Engine, load
from qwenq.runtime.sampling import GREEDY, Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> QwenTokenizer:
    return load_tokenizer(folder)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def runner(folder: Path) -> Engine:
    return load(folder, device="cpu", dtype="float32", real_vocab=REAL_VOCAB)


class RecordingSession(Session):
    """A real session that keeps the prompts it was given."""

    def answer(self, prompt, *args, **kwargs):
        self.prompts = [*getattr(self, "prompts", []), list(prompt)]
        return super().answer(prompt, *args, **kwargs)


def conversation(
    runner: Engine, tokenizer: QwenTokenizer, **changes
) -> tuple[Conversation, RecordingSession]:
    session = RecordingSession(runner)
    settings = {"sampling": GREEDY, "max_new_tokens": 12, **changes}
    return Conversation(session, tokenizer, **settings), session


def test_prompts_of_qwen_v1_follow_its_template(runner: Engine, tokenizer: QwenTokenizer) -> None:
    chat, session = conversation(runner, tokenizer, system="Be brief.")
    list(chat.ask("One?"))
    list(chat.ask("Two?"))
    answers = [
        runner.generate([prompt], 12, stop_ids=tokenizer.eos_ids).answers[0].ids for prompt in session.prompts
    ]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    assert session.prompts[0] == build_context(tokenizer, messages).ids
    messages += [
        {"role": "assistant", "content": tokenizer.decode(answers[0])},
        {"role": "user", "content": "Two?"},
    ]
    assert session.prompts[1] == build_context(tokenizer, messages).ids


def test_the_shared_beginning_is_computed_once(runner: Engine, tokenizer: QwenTokenizer) -> None:
    chat, session = conversation(runner, tokenizer)
    list(chat.ask("A first question, a bit longer than the next."))
    first = session.timing.prefill_tokens
    assert first == len(session.prompts[0])
    list(chat.ask("Next."))
    assert session.timing.prefill_tokens - first < len(session.prompts[1]) - len(session.prompts[0]) + 4


def test_reusing_the_cache_changes_no_answer(runner: Engine) -> None:
    session = Session(runner)
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 2, 3, 9, 8, 7], [1, 2], [5] * 300, [5] * 299]
    for prompt in prompts:
        fresh = runner.generate([prompt], 8).answers[0].ids
        assert list(session.answer(prompt, 8)) == fresh


def test_a_cache_with_another_ntk_factor_is_not_reused(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "short", seq_length=32)
    runner = load(folder, device="cpu", dtype="float32")
    session = Session(runner)
    ids = [(7 * i) % 200 for i in range(120)]
    for length in (20, 40, 90, 10, 33):  # factors 1, 3, 7, 1, 3
        assert list(session.answer(ids[:length], 5)) == runner.generate([ids[:length]], 5).answers[0].ids


def test_an_answer_cut_short_stays_as_far_as_it_came(runner: Engine, tokenizer: QwenTokenizer) -> None:
    chat, session = conversation(runner, tokenizer)
    pieces = chat.ask("One?")
    for _ in range(4):
        next(pieces)
    pieces.close()
    list(chat.ask("Two?"))
    whole = runner.generate([session.prompts[0]], 12).answers[0].ids
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": tokenizer.decode(whole[:4])},
        {"role": "user", "content": "Two?"},
    ]
    assert session.prompts[1] == build_context(tokenizer, messages).ids


def test_a_question_without_any_answer_is_forgotten(runner: Engine, tokenizer: QwenTokenizer) -> None:
    chat, session = conversation(runner, tokenizer)

    def interrupted(*_, **__):
        raise KeyboardInterrupt
        yield

    session.answer, kept = interrupted, session.answer  # Ctrl-C during the prefill
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("Never mind."))
    session.answer = kept
    list(chat.ask("Two?"))
    assert session.prompts[-1] == build_context(tokenizer, [{"role": "user", "content": "Two?"}]).ids


def test_the_oldest_rounds_are_dropped_when_the_context_is_full(
    tmp_path: Path, tokenizer: QwenTokenizer
) -> None:
    folder = write_chat_folder(tmp_path / "small", max_position_embeddings=200)
    runner = load(folder, device="cpu", dtype="float32", real_vocab=REAL_VOCAB)
    chat, session = conversation(runner, tokenizer)
    dropped = []
    for turn in range(6):
        list(chat.ask(f"Question number {turn}?"))
        dropped.append(chat.dropped_rounds)
        assert len(session.prompts[-1]) + 12 <= 200
        assert session.prompts[-1][: len(tokenizer.encode("system"))] == session.prompts[0][:6]
        assert tokenizer.encode(f"number {turn}?")[-1] in session.prompts[-1]
    assert dropped[0] == 0 < dropped[-1] < 6
    assert dropped == sorted(dropped)


def test_v1s_window_drops_before_the_context_does(folder: Path, runner: Engine) -> None:
    ranks = load_tokenizer(folder).ranks  # type: ignore[attr-defined]
    narrow = QwenTokenizer(ranks, max_window=120)
    chat, session = conversation(runner, narrow)
    for turn in range(4):
        list(chat.ask(f"Question number {turn}?"))
    assert chat.dropped_rounds > 0
    assert len(session.prompts[-1]) < 120 + 60


def test_a_question_longer_than_the_context(tmp_path: Path, tokenizer: QwenTokenizer) -> None:
    folder = write_chat_folder(tmp_path / "small", max_position_embeddings=128)
    runner = load(folder, device="cpu", dtype="float32")
    chat, _ = conversation(runner, tokenizer, max_new_tokens=64)
    with pytest.raises(UsageError, match="the model takes 128"):
        list(chat.ask("x" * 100))
    assert list(chat.ask("short"))  # the chat goes on


def test_a_base_model_is_refused(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "base", chat_format="raw")
    runner = load(folder, device="cpu", dtype="float32")
    with pytest.raises(UsageError, match="base model") as caught:
        conversation(runner, load_tokenizer(folder))  # type: ignore[arg-type]
    assert "-Chat" in (caught.value.hint or "")


def test_sampled_answers_differ_from_turn_to_turn_and_repeat_with_the_seed(
    runner: Engine, tokenizer: QwenTokenizer
) -> None:
    texts = []
    for _ in range(2):
        chat, _session = conversation(runner, tokenizer, sampling=Sampling(temperature=5.0, seed=4))
        texts.append(["".join(chat.ask("Again?")) for _ in range(2)])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_streamed_text_is_the_decoded_answer(runner: Engine, tokenizer: QwenTokenizer) -> None:
    chat, session = conversation(runner, tokenizer, sampling=Sampling(temperature=3.0), max_new_tokens=60)
    streamed = "".join(chat.ask("Bytes?"))
    cache_ids = session._ids[len(session.prompts[0]) :]
    assert streamed == printable(tokenizer.decode(cache_ids))


@given(st.text())
def test_nothing_that_is_shown_steers_the_terminal(text: str) -> None:
    shown = printable(f"{text}\x1b]0;title\x07\x9b31m\r\x00{text}")
    assert not any(ord(char) < 32 and char not in "\n\t" for char in shown)
    assert not any(0x7F <= ord(char) < 0xA0 for char in shown)


def test_ordinary_text_is_shown_as_it_is() -> None:
    text = "tab\there, line\nend, 你好, é, 👩\u200d💻"
    assert printable(text) == text


def test_unused_rows_are_never_in_an_answer(runner: Engine, tokenizer: QwenTokenizer) -> None:
    hot = Sampling(temperature=100.0)
    ids = runner.generate([[1, 2]] * 4, 100, sampling=hot).answers
    assert max(max(answer.ids) for answer in ids) < REAL_VOCAB
    assert torch.isfinite(runner.logits([[1]])[0]).all()
