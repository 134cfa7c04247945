"""Perplexity by context length, against the plain v1 forward pass in float64."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.plain_qwen_v1 import MemorySource, forward, random_tensors, small_config
from runtime.small_models import small_model

from qwenq.errors import OutOfMemoryError, UsageError
from qwenq.evals.perplexity import (
    METRIC,
    ScoredText,
    Switches,
    combinations,
    perplexities,
    require_lengths,
    window_nats,
)
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.qwen_v1 import qwen2_view
from qwenq.results import Model, Row
from qwenq.runtime.decoder import Decoder
from qwenq.runtime.engine import load

S = 64  # seq_length of the small v1 model
ALL = [Switches(ntk, logn) for ntk in (False, True) for logn in (False, True)]


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return small_config(max_position_embeddings=512)


@pytest.fixture(scope="module")
def tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    # small enough that the model is unsure, so that a perplexity has something to say
    return {name: value * (0.5 if "lm_head" in name else 1) for name, value in random_tensors(config).items()}


@pytest.fixture(scope="module")
def eval_model(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    plain, source = qwen2_view(Path("in-memory"), config, MemorySource(tensors))
    return contender_of(Checkpoint(Path("in-memory"), plain, source))


def contender_of(checkpoint: Checkpoint) -> Any:
    return SimpleNamespace(
        checkpoint=checkpoint,
        model=Model("Tiny", "sha256:tiny", "fp32", "Tiny"),
        settings={"device": "cpu", "dtype": "float32", "attention": "sdpa", "kernel": "auto"},
        engine=load(checkpoint, device="cpu", dtype="float32", attention="sdpa"),
    )


@pytest.fixture(scope="module")
def text() -> ScoredText:
    generator = torch.Generator().manual_seed(1)
    return ScoredText("random.txt", torch.randint(0, 256, (2, 256), generator=generator))


def measured(
    eval_model: Any, text: ScoredText, lengths: list[int], **options: Any
) -> dict[tuple[Any, ...], Row]:
    switches = combinations(eval_model.checkpoint.config, None, None)
    rows = list(perplexities(eval_model, text, lengths, switches, **options))
    assert {row.metric for row in rows} == {METRIC}
    return {(r.point["seq_len"], r.point.get("ntk"), r.point.get("logn")): r for r in rows}


def oracle(config: dict[str, Any], tensors: dict[str, torch.Tensor], text: ScoredText, length: int) -> float:
    """exp of the mean of all windows' nats, window by window, in float64."""
    exact = {name: value.double() for name, value in tensors.items()}
    nats = [
        torch.nn.functional.cross_entropy(forward(config, exact, window.tolist())[:-1], window[1:])
        for window in text.tokens.view(-1, length)
    ]
    return math.exp(float(torch.stack(nats).mean()))


def word(on: bool) -> str:
    return "on" if on else "off"


@pytest.mark.parametrize("switch", ALL, ids=str)
def test_every_combination_is_that_of_the_plain_model(
    eval_model: Any,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    text: ScoredText,
    switch: Switches,
) -> None:
    rows = measured(eval_model, text, [32, 128, 256])
    for length in (32, 128, 256):
        row = rows[length, word(switch.ntk), word(switch.logn)]
        plain = {**config, "use_dynamic_ntk": switch.ntk, "use_logn_attn": switch.logn}
        assert row.value == pytest.approx(oracle(plain, tensors, text, length), rel=1e-4)
        assert row.n == 512 // length * (length - 1)
        assert row.details["as_released"] == (switch == Switches(True, True))
        assert row.low is not None and row.high is not None and row.low < row.value < row.high


def test_switches_matter_beyond_the_trained_length_alone(eval_model: Any, text: ScoredText) -> None:
    rows = measured(eval_model, text, [32, S, 128])
    for length in (32, S):
        assert len({row.value for (found, *_), row in rows.items() if found == length}) == 1
    assert len({row.value for (found, *_), row in rows.items() if found == 128}) == 4


def test_the_model_itself_is_left_as_it_is(eval_model: Any) -> None:
    decoder: Decoder = eval_model.engine.decoder
    switched = decoder.switched(dynamic_ntk=False, logn=False)
    assert switched.embedding is decoder.embedding and switched.blocks is decoder.blocks
    assert (decoder.rope.alpha(2 * S), switched.rope.alpha(2 * S)) == (3, 1)


def test_windows_are_alike_whichever_run_together(
    eval_model: Any, text: ScoredText, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = window_nats(eval_model.engine.decoder, text.tokens.view(-1, 32))
    assert together.shape == (16, 31)
    monkeypatch.setattr("qwenq.evals.perplexity.TOKENS_PER_PASS", 32)
    monkeypatch.setattr("qwenq.evals.perplexity.SLAB_TOKENS", 7)
    alone = window_nats(eval_model.engine.decoder, text.tokens.view(-1, 32))
    assert together == pytest.approx(alone, abs=1e-5)


def test_other_models_run_as_they_are() -> None:
    _, checkpoint = small_model("qwen2-tied")
    generator = torch.Generator().manual_seed(2)
    text = ScoredText("random.txt", torch.randint(0, 300, (1, 64), generator=generator))
    told = []
    rows = measured(
        contender_of(checkpoint), text, [16, 64], progress=lambda done, total: told.append((done, total))
    )
    assert set(rows) == {(16, None, None), (64, None, None)}
    assert rows[64, None, None].low is None  # a single window has no spread
    assert told == [(64, 128), (128, 128)]
    with pytest.raises(UsageError, match="only Qwen v1") as caught:
        combinations(checkpoint.config, None, False)
    assert caught.value.where == "--logn"
    with pytest.raises(UsageError, match="only Qwen v1"):
        contender_of(checkpoint).engine.decoder.switched(dynamic_ntk=True, logn=True)


def test_combinations_can_be_ruled_out(eval_model: Any) -> None:
    config = eval_model.checkpoint.config
    assert combinations(config, None, None) == ALL
    assert combinations(config, True, None) == ALL[2:]
    assert combinations(config, True, False) == [Switches(True, False)]


def test_a_length_that_does_not_fit_is_an_unavailable_row(
    eval_model: Any, text: ScoredText, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(decoder: Decoder, windows: torch.Tensor) -> Any:
        if windows.shape[1] == 256:
            raise OutOfMemoryError("not enough memory")
        return window_nats(decoder, windows)

    monkeypatch.setattr("qwenq.evals.perplexity.window_nats", refuse)
    rows = measured(eval_model, text, [128, 256])
    assert rows[128, "on", "on"].status == "ok"
    lost = rows[256, "on", "on"]
    assert (lost.status, lost.reason, lost.n) == ("unavailable", "not enough memory", None)


def test_nan_logits_make_a_failed_row(
    eval_model: Any, text: ScoredText, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = lambda decoder, windows: window_nats(decoder, windows) * float("nan")  # noqa: E731
    monkeypatch.setattr("qwenq.evals.perplexity.window_nats", nan)
    assert {row.status for row in measured(eval_model, text, [32]).values()} == {"failed"}


@pytest.mark.parametrize("length", [1, 48, 512])
def test_lengths_have_to_divide_the_longest(text: ScoredText, length: int) -> None:
    with pytest.raises(UsageError, match=f"a window of {length} tokens"):
        require_lengths([32, length], text)
