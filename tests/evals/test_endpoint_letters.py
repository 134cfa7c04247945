"""Letters through an endpoint: the items and scores of our engine on the same model, or a clear refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from evals.endpoint_server import Server, at
from evals.letter_server import LetterServer
from evals.test_task_cmmlu import write_cmmlu

from qwenq import http
from qwenq.errors import QwenqError, UsageError
from qwenq.evals.answer_log import AnswerRecord, read_answer_log
from qwenq.evals.endpoint import ECHO, TOP, RemoteModel, score_letters
from qwenq.evals.model import LoadOptions, LocalModel, open_eval_model
from qwenq.evals.run import answer, make_plan
from qwenq.evals.task import Choose, DataSource
from qwenq.evals.tasks.registry import get_task
from qwenq.events import silent

LETTERS = " A B C D" * 30
SAMPLE = DataSource(sample=True)
Serve = Callable[[str], RemoteModel]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """A model whose tokenizer has `` A`` as a token, and ``(A)`` as three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "TEXT", tiny_model.TEXT + LETTERS)
        folder = tmp_path_factory.mktemp("served") / "Tiny"
        tiny_model.write_tiny_model(folder, max_position_embeddings=8192)
    return open_eval_model(str(folder), LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture
def serve(model: LocalModel) -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(manner: str) -> RemoteModel:
            server = stack.enter_context(LetterServer(model, manner))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
            servers.append(server)
            return at(server, timeout=60.0, concurrency=2)

        servers.clear()
        yield start


servers: list[Server] = []


def records(
    run: Path,
    model: LocalModel | RemoteModel,
    task: str,
    protocol: str,
    source: DataSource = SAMPLE,
    subjects: tuple[str, ...] = (),
) -> list[AnswerRecord]:
    plan = make_plan(get_task(task, protocol), source, subjects, 1, 8 if subjects else 2)
    answers = answer(model, plan, run, silent)
    assert len(answers.judged) == 8
    (file,) = (run / "records").glob("*.jsonl")
    return sorted(read_answer_log(file), key=lambda record: record.id)


@pytest.mark.parametrize("manner", ["vllm", "llama"])
@pytest.mark.parametrize(("task", "protocol"), [("mmlu", "base"), ("mmlu", "lm-eval"), ("ceval", "base")])
def test_items_and_scores_are_those_of_our_engine(
    serve: Serve, model: LocalModel, tmp_path: Path, manner: str, task: str, protocol: str
) -> None:
    compare(
        records(tmp_path / "ours", model, task, protocol),
        records(tmp_path / "theirs", serve(manner), task, protocol),
    )


@pytest.mark.parametrize("manner", ["vllm", "llama"])
def test_cmmlu_has_the_scores_of_our_engine(
    serve: Serve, model: LocalModel, tmp_path: Path, manner: str
) -> None:
    source, subjects = write_cmmlu(tmp_path), ("agronomy",)
    compare(
        records(tmp_path / "ours", model, "cmmlu", "base", source, subjects),
        records(tmp_path / "theirs", serve(manner), "cmmlu", "base", source, subjects),
    )


def compare(ours: list[AnswerRecord], theirs: list[AnswerRecord]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.id, one.asked, one.subject) == (other.id, other.asked, other.subject)
        assert (one.correct, one.extracted) == (other.correct, other.extracted)
        assert one.prompt_tokens == other.prompt_tokens
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        assert other.published == () and "published" not in other.also, "its dtype is unknown"
        assert other.implementation.startswith("big/model served at http://127.0.0.1")
    assert {record.extracted for record in ours} <= set("ABCD")


def test_letters_beyond_the_list_are_echoed_by_vllm_and_listed_by_llama(
    serve: Serve, model: LocalModel
) -> None:
    unlikely = Choose("Quantise the weights", tuple(" " + letter for letter in "ABCD"))
    found = {manner: score_letters(serve(manner), unlikely) for manner in ("vllm", "llama")}
    assert (found["vllm"].how, found["llama"].how) == (ECHO, TOP)
    assert found["vllm"].answer.logprobs == pytest.approx(found["llama"].answer.logprobs, abs=1e-4)
    assert found["vllm"].prompt_tokens == found["llama"].prompt_tokens > 0


def test_what_a_server_refuses_is_asked_once(serve: Serve) -> None:
    endpoint = serve("vllm")
    for _ in range(2):
        score_letters(endpoint, Choose("Quantise the weights", (" A", " B")))
    (server,) = servers
    assert [asked.get("echo", asked["logprobs"]) for asked in server.seen] == [
        *(20, 2000, True, True),
        *(20, True, True),
    ]
    assert all(asked["max_tokens"] == 1 and asked["temperature"] == 0 for asked in server.seen)


def test_continuations_of_several_tokens_are_echoed(serve: Serve, model: LocalModel) -> None:
    """GPQA's, as the harness asks it; our engine adds up the same tokens."""
    from qwenq.evals.answering import score_choices
    from qwenq.evals.batching import ChoiceTokens, budget_for

    choices = tuple(f" ({letter})" for letter in "ABCD")
    tokenizer = model.tokenizer
    tokens = tuple(tuple(tokenizer.encode(choice)) for choice in choices)
    assert all(len(one) > 1 for one in tokens)
    asked = ChoiceTokens("x", tuple(tokenizer.encode("Answer:")), tokens)
    ((_, ours),) = next(score_choices(model.engine, [asked], budget_for(model.engine)))
    theirs = score_letters(serve("vllm"), Choose("Answer:", choices))
    assert theirs.how == ECHO
    assert theirs.answer.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
    with pytest.raises(UsageError, match="refuses echo with logprobs"):
        score_letters(serve("llama"), Choose("Answer:", choices))


@pytest.mark.parametrize(("manner", "reason"), [
    ("silent", "its replies hold no logprobs"),
    ("logits_all", "it refuses logprobs=20"),
    ("merging", "no token of its echo begins where ' A' does"),
])  # fmt: skip
def test_a_server_without_log_probabilities_is_refused_clearly(
    serve: Serve, tmp_path: Path, manner: str, reason: str
) -> None:
    endpoint = serve(manner)
    with pytest.raises(UsageError, match="this server does not score ' A', ' B', ' C', ' D'") as caught:
        records(tmp_path, endpoint, "mmlu", "base")
    assert reason in caught.value.what
    assert caught.value.where == endpoint.url
    assert "--protocol card" in str(caught.value.hint)


def test_a_refusal_for_another_reason_stays_what_it_is(server: Server) -> None:
    server.trouble = ["400"]
    with pytest.raises(QwenqError, match=r"status 400.*trouble 400"):
        score_letters(at(server), Choose("?", ("A", "B")))


def answer_always(monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]) -> None:
    """Let any server reply with this, whatever it is asked."""
    monkeypatch.setattr(http.Server, "_once", lambda self, path, body: said)


@pytest.mark.parametrize("logprobs", [
    None, "x", [], {"top_logprobs": [None]}, {"content": [{}]}, {"content": [{"top_logprobs": ["A"]}]},
    {"top_logprobs": [{"A": None, "B": "x"}]}, {"tokens": ["?", "A"], "token_logprobs": [None]},
    {"tokens": ["?", "A"], "token_logprobs": [None, None]}, {"top_logprobs": [{"A": float("nan"), "B": 0.0}]},
])  # fmt: skip
def test_odd_replies_are_no_tracebacks(monkeypatch: pytest.MonkeyPatch, logprobs: Any) -> None:
    answer_always(monkeypatch, {"choices": [{"text": "A", "logprobs": logprobs}], "usage": None})
    with pytest.raises(UsageError, match="this server does not score 'A', 'B'"):
        score_letters(RemoteModel(http.Server("http://h/v1"), "m"), Choose("?", ("A", "B")))
    answer_always(monkeypatch, {"choices": []})
    with pytest.raises(QwenqError, match="a reply without an answer"):
        score_letters(RemoteModel(http.Server("http://h/v1"), "m"), Choose("?", ("A", "B")))
