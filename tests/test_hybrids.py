"""Linear attention beside full attention: bits and rules, recurrent states in the cache, draft heads."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, manifest_of, run
from safetensors.torch import load_file
from tiny_families import write_calibration
from tiny_published import fused, rewrite, with_draft_head, write_published

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.evals.answering import score_choices, shared_groups
from qwenq.evals.batching import ChoiceTokens, budget_for
from qwenq.models.checkpoint import open_checkpoint
from qwenq.quantization import quantize
from qwenq.recipe import Recipe
from qwenq.runtime.chat import Session
from qwenq.runtime.engine import Engine, load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [40, 41, 42, 43], [77]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture(
    scope="module", params=product(["qwen3_next", "qwen3_5_text", "qwen3_5_moe"], ["fast", "transformers"])
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    family, name = request.param
    model = write_published(tmp_path_factory.mktemp("m") / "m", family)
    return load(model, device="cpu", dtype="float32", engine=name)


def logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    return engine.logits([ids])[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_ragged_rows_are_rows_alone_and_go_on_as_such(engine: Engine) -> None:
    cache = engine.new_cache(3, 12)
    for prompt, found in zip(PROMPTS, engine.logits(PROMPTS, cache), strict=True):
        close(found, logits(engine, prompt))
    step = engine.decode(torch.tensor([1, 2, 3]), cache)
    for row, prompt in enumerate(PROMPTS):
        close(step[row], logits(engine, [*prompt, row + 1])[-1])


def test_a_shared_prefix_is_taken_many_times(engine: Engine) -> None:
    prefix, tails = PROMPTS[0], [[20, 21], [30], [50, 51, 52]]
    kept = engine.new_cache(1, len(prefix))
    engine.prefill([prefix], kept)
    rows = kept.take([0, 0, 0], 16)
    found = engine.prefill(tails, rows)
    for row, tail in enumerate(tails):
        close(found[row], logits(engine, [*prefix, *tail])[-1])
    again = kept.take([0], 16)  # the prefix is as it was
    close(engine.prefill([tails[2]], again)[0], found[2])


def test_rows_are_replaced_dropped_and_emptied_with_their_states(engine: Engine) -> None:
    cache = engine.new_cache(3, 16)
    engine.prefill(PROMPTS, cache)
    other = engine.new_cache(1, 16)
    engine.prefill([[60, 61, 62]], other)
    cache.put([1], other)
    assert cache.keep([1, 2]) == [2, 1]
    step = engine.decode(torch.tensor([4, 9]), cache)
    close(step[0], logits(engine, [*PROMPTS[2], 4])[-1])
    close(step[1], logits(engine, [60, 61, 62, 9])[-1])
    cache.clear([0])
    close(engine.prefill([[33, 34]], cache.take([0]))[0], logits(engine, [33, 34])[-1])


def test_states_are_rewound_to_nothing_or_not_at_all(engine: Engine) -> None:
    cache = engine.new_cache(1, 16)
    engine.prefill([PROMPTS[0]], cache)
    cache.rewind(len(PROMPTS[0]))
    with pytest.raises(UsageError, match="recurrent states"):
        cache.rewind(3)
    cache.rewind(0)
    close(engine.prefill([PROMPTS[1]], cache)[0], logits(engine, PROMPTS[1])[-1])


def test_a_session_answers_as_from_the_start(engine: Engine) -> None:
    session = Session(engine)
    first = list(session.answer(PROMPTS[0], 4))
    for prompt in ([*PROMPTS[0], *first, 3, 4], [*PROMPTS[0][:5], 90, 91]):  # goes on; branches off
        assert list(session.answer(prompt, 4)) == list(Session(engine).answer(prompt, 4))


def test_items_with_a_shared_prefix_score_as_alone(engine: Engine) -> None:
    """The prefix is computed once; each batch of tails of unlike length goes on from a copy of its states."""
    prefix = [(7 * place) % 90 for place in range(70)]
    tails = [[20, 21], [30], [50, 51, 52], [40, 41], [60]]
    choices = ((5,), (6, 7), (8,))
    requests = [ChoiceTokens(str(n), (*prefix, *tail), choices) for n, tail in enumerate(tails)]
    (group,) = shared_groups(engine, [request.prompt for request in requests])
    assert group.length == len(prefix)
    found = dict(chain.from_iterable(score_choices(engine, requests, budget_for(engine, batch=2))))
    for number, request in enumerate(requests):
        ((_, alone),) = next(score_choices(engine, [request], budget_for(engine)))
        assert found[number].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_quantised_hybrid_is_the_same_in_both_engines(tmp_path: Path, family: str) -> None:
    """Rows of packed weights, with zero points, are put in order: gates, rotated parts, key heads."""
    out = tmp_path / "out"
    run(write_published(tmp_path / "m", family), out, sym=False, any_engine=True)
    fast, other = (load(out, device="cpu", dtype="float32", engine=name) for name in ("fast", "transformers"))
    ids = [place % 90 for place in range(80)]
    close(logits(fast, ids), logits(other, ids))


def test_states_count_into_the_rows_that_fit(engine: Engine) -> None:
    budget = budget_for(engine, decode=True)
    states = [tensor for pair in engine.new_cache(3, 1).states for tensor in pair]
    assert budget.states == sum(tensor[0].nbytes for tensor in states) > 0
    budget.memory, budget.rows = 10 * budget.states, 1000
    assert budget.rows_to_decode(1) < 10


def test_linear_attention_has_eight_bits_and_the_rest_four(tmp_path: Path) -> None:
    model, ear = write_published(tmp_path / "m", "qwen3_5_moe"), Recorder()
    run(model, tmp_path / "out", ear)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.language_model.layers"
    assert tensors[f"{prefix}.0.linear_attn.in_proj_qkv.qweight"].shape[0] == 64 * 8 // 32
    assert tensors[f"{prefix}.3.self_attn.q_proj.qweight"].shape[0] == 64 * 4 // 32
    kept = {name.split(".", 3)[3] for name in manifest_of(tmp_path / "out")["not_quantised"]}
    assert kept == {
        "linear_attn.conv1d.weight",
        "linear_attn.in_proj_a.weight",
        "linear_attn.in_proj_b.weight",
        "mlp.gate.weight",
        "mlp.shared_expert_gate.weight",
    }
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert r"-:.*\.linear_attn\.(conv1d|in_proj_a|in_proj_b|in_proj_ba)$" in rules
    assert "-:.*visual.*" in rules
    (own,) = [rule for rule in rules if rule.startswith("+:")]
    assert (own, rules[own]["bits"]) == (
        r"+:.*\.linear_attn\.(out_proj|in_proj_qkv|in_proj_z|in_proj_qkvz)$",
        8,
    )


def test_files_as_published_give_the_integers_of_transformers_own(tmp_path: Path) -> None:
    """Fused experts, a draft head, a float32 decay: what is quantised is the same."""

    def published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return with_draft_head(fused(tensors))

    apart = write_published(tmp_path / "apart", "qwen3_5_moe")
    together = rewrite(write_published(tmp_path / "together", "qwen3_5_moe"), published)
    tokens = write_calibration(apart, tmp_path / "t.safetensors")
    for model in (apart, together):
        run(model, tmp_path / f"{model.name}-out", calibration=tokens)
    first, second = (load_file(tmp_path / f"{n}-out" / "model.safetensors") for n in ("apart", "together"))
    assert {name for name in second if name not in first} == set(with_draft_head({}))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rules = json.loads((tmp_path / "together-out" / "config.json").read_text())["quantization_config"][
        "dynamic"
    ]
    assert "-:.*mtp.*" in rules


def test_as_qwen_publishes_it(tmp_path: Path) -> None:
    """The settings of Qwen's own Int4 files: attention and the shared expert stay as they are."""
    model = write_published(tmp_path / "m", "qwen3_5_moe")
    run(model, tmp_path / "out", module_bits={"attn": 16, "shared_expert": 16})
    checkpoint = open_checkpoint(tmp_path / "out")
    packed = {name for name in checkpoint.names() if name.endswith(".qweight")}
    assert packed
    assert all(".mlp.experts." in name for name in packed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {
        "lm_head": {},
        "model.language_model.embed_tokens": {},
        "-:.*attn.*": {},
        "-:.*shared_expert.*": {},
        "-:.*mtp.*": {},
        "-:.*visual.*": {},
    }
    before = load(tmp_path / "out", device="cpu", dtype="float32", engine="transformers")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    after = load(tmp_path / "out", device="cpu", dtype="float32", engine="transformers")
    assert torch.equal(logits(before, PROMPTS[0]), logits(after, PROMPTS[0]))


def test_a_hybrid_writes_its_own_calibration_text(tmp_path: Path) -> None:
    model = write_published(tmp_path / "m", "qwen3_5_text")
    recipe = Recipe().override(
        {"model": str(model)},
        calibration={"samples": 2, "seq_len": 16, "held_out": 2},
        quantize={"dtype": "float32"},
    )
    assert quantize(recipe, tmp_path / "out", Recorder(), device="cpu").check is not None


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            {"layer_types": ["full_attention"] * 3},
            ModelError,
            "num_hidden_layers = 4, but its layer_types name 3 layers",
        ),
        (
            {"layer_types": ["full_attention", "mamba"] * 2},
            UnsupportedError,
            "names mamba, which is not known",
        ),
        ({"layer_types": []}, ModelError, "num_hidden_layers = 4, but its layer_types name 0 layers"),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            ModelError,
            "names sliding_attention, which no layer of a qwen3_5_text has",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention", "full_attention"] * 2},
            ModelError,
            "names linear_attention, which no layer of a qwen3 has",
        ),
        ({"linear_num_key_heads": 0}, ModelError, "linear_num_key_heads = 0"),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = write_published(tmp_path / "m", "qwen3_5_text")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=said):
        open_checkpoint(model)


def test_the_newest_relative_is_refused_by_name(tmp_path: Path) -> None:
    model = write_published(tmp_path / "m", "qwen3_5_text")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "qwen4_exp_text"}))
    with pytest.raises(UnsupportedError, match="hyper-connections"):
        open_checkpoint(model)


def test_no_tensor_is_lost_without_a_name(tmp_path: Path) -> None:
    """A block's tensor that the architecture has no place for is an error, not a copy."""
    change = partial(
        lambda extra, tensors: tensors | extra, {"model.layers.1.mlp.extra.weight": torch.ones(2, 2)}
    )
    model = rewrite(write_published(tmp_path / "m", "qwen3_5_text"), change)
    with pytest.raises(ModelError, match="has no place in this architecture"):
        run(model, tmp_path / "out")
