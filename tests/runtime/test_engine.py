"""The protocol's generation, the door to the engines, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.plain_qwen_v1 import MemorySource, quantise_v1, random_tensors, small_config, write_v1
from runtime.small_models import random_ids, reference_logits, small_model

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource
from qwenq.models.machine import resolve_device
from qwenq.runtime import engine as door
from qwenq.runtime.engine import Engine, find_attention, find_dtype, load
from qwenq.runtime.generation import Timing
from qwenq.runtime.sampling import GREEDY, Sampling

ENGINES = ("fast", "transformers")


@pytest.fixture(scope="module", params=ENGINES)
def runner(request: pytest.FixtureRequest) -> Engine:
    _, checkpoint = small_model("qwen2-tied")
    return load(checkpoint, device="cpu", dtype="float32", engine=request.param)


def changed(checkpoint: Checkpoint, config: dict | None = None, **tensors: torch.Tensor | None) -> Checkpoint:
    """The checkpoint with other config keys, and tensors replaced or (None) removed."""
    new = {**checkpoint.source.tensors, **{name.replace("__", "."): t for name, t in tensors.items()}}
    kept = {name: tensor for name, tensor in new.items() if tensor is not None}
    return Checkpoint(checkpoint.folder, {**checkpoint.config, **(config or {})}, MemorySource(kept))


def test_a_batch_answers_as_each_row_alone(runner: Engine) -> None:
    prompts = [random_ids(n, n) for n in (3, 40, 11)]
    together = runner.generate(prompts, 12)
    alone = [runner.generate([prompt], 12).answers[0] for prompt in prompts]
    assert together.answers == alone
    assert together.timing.prefill_tokens == 54
    assert together.timing.decode_tokens == 3 * 11
    assert together.timing.decode_seconds > 0


def test_sampled_answers_repeat_with_their_seed(runner: Engine) -> None:
    prompt = random_ids(5)
    answers = [runner.generate([prompt], 30, sampling=Sampling(seed=s)).answers[0].ids for s in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_stop_id_ends_its_row_alone(runner: Engine) -> None:
    prompts = [random_ids(n, n) for n in (3, 40)]
    free = runner.generate(prompts, 12).answers
    stop = free[0].ids[4]
    seen: list[tuple[int, int]] = []
    done = runner.generate(
        prompts, 12, stop_ids=[stop], on_token=lambda row, token: seen.append((row, token))
    )
    assert done.answers[0].ids == free[0].ids[: free[0].ids.index(stop)]
    assert done.answers[0].stop_id == stop
    assert [token for row, token in seen if row == 1] == done.answers[1].ids
    if stop not in free[1].ids:
        assert done.answers[1] == free[1]


def test_the_loop_ends_when_all_rows_have(runner: Engine) -> None:
    prompt = random_ids(7)
    first = runner.generate([prompt], 1).answers[0].ids[0]
    done = runner.generate([prompt, prompt], 50, stop_ids=[first])
    assert [answer.ids for answer in done.answers] == [[], []]
    assert done.timing.decode_tokens == 0


def test_exact_tokens_never_choose_a_stop_id(runner: Engine) -> None:
    """As transformers' own min_length: the likeliest of the other tokens comes instead, and goes on."""
    prompt = random_ids(7)
    free = runner.generate([prompt], 25).answers[0].ids
    stops = set(free[:3])
    (answer,) = runner.generate([prompt], 25, stop_ids=stops, exact_tokens=True).answers
    assert len(answer.ids) == 25
    assert answer.stop_id is None
    assert not stops & set(answer.ids)
    logits = runner.logits([[*prompt, *answer.ids[:-1]]])[0][len(prompt) - 1 :].clone()  # [25, vocabulary]
    logits[:, sorted(stops)] = -torch.inf
    assert logits.argmax(-1).tolist() == answer.ids


def test_a_vocabulary_that_is_all_suppressed_is_refused(runner: Engine) -> None:
    with pytest.raises(UsageError, match="every token is suppressed"):
        runner.generate([random_ids(7)], 5, stop_ids=range(runner.vocab_size), exact_tokens=True)


def test_streaming_gives_the_same_tokens_and_leaves_a_usable_cache(runner: Engine) -> None:
    prompt = random_ids(9)
    whole = runner.generate([prompt], 20).answers[0].ids
    cache = runner.new_cache(1, 40)
    streamed = []
    for token in runner.stream(prompt, 20, GREEDY, (), cache, Timing()):
        streamed.append(token)
        if len(streamed) == 8:
            break
    assert streamed == whole[:8]
    assert cache.lengths == [9 + 7]  # all but the newest
    assert runner.generate([streamed[-1:]], 12, cache=cache).answers[0].ids == whole[8:]


def test_padded_vocabulary_rows_are_never_sampled() -> None:
    config = small_config()
    tensors = random_tensors(config)
    from qwenq.models.qwen_v1 import qwen2_view

    plain, source = qwen2_view(Path("in-memory"), config, MemorySource(tensors))
    plain["qwen_v1"]["real_vocab"] = 5
    for engine in ENGINES:
        runner = load(Checkpoint(Path("in-memory"), plain, source), device="cpu", engine=engine)
        for sampling in (GREEDY, Sampling(temperature=5.0)):
            done = runner.generate([[1, 2, 3], [4]], 30, sampling=sampling)
            assert max(max(answer.ids) for answer in done.answers) < 5
        assert runner.logits([[1]])[0].shape == (1, 256)  # logits themselves are whole


def test_a_gptq_folder_runs_as_its_dequantised_weights(tmp_path: Path) -> None:
    config, tensors = quantise_v1(small_config(), random_tensors(small_config()), bits=4, group_size=16)
    folder = write_v1(tmp_path / "int4", config, tensors)
    packed = open_checkpoint(folder)
    settings = QuantConfig.read(packed.config)
    dense = DequantisedSource(packed.source, settings, torch.float32)
    plain = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    expected = load(Checkpoint(folder, plain, dense), device="cpu", dtype="float32").logits([[5, 6, 7]])[0]
    for engine in ENGINES:
        runner = load(folder, device="cpu", dtype="float32", engine=engine)
        torch.testing.assert_close(runner.logits([[5, 6, 7]])[0], expected, atol=1e-4, rtol=1e-4)
        if engine == "fast":
            assert "dequantise" in runner.implementation


@pytest.mark.parametrize(
    ("prompts", "says"),
    [([[]], "an empty prompt"), ([[1, 300]], "ids run from 1 to 300"), ([[-1]], "ids run from -1")],
)
def test_prompts_that_cannot_be_run(runner: Engine, prompts: list[list[int]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        runner.prefill(prompts, runner.new_cache(1, 8))


def test_what_does_not_fit_the_cache_is_refused_first(runner: Engine) -> None:
    cache = runner.new_cache(1, 10)
    with pytest.raises(UsageError, match="a prompt of 8 and 4 new tokens do not fit into a cache of 10"):
        runner.generate([random_ids(8)], 4, cache=cache)
    assert cache.lengths == [0]
    assert len(runner.generate([random_ids(8)], 3, cache=cache).answers[0].ids) == 3
    with pytest.raises(UsageError, match="2 prompts"):
        runner.prefill([[1], [2]], cache)
    with pytest.raises(UsageError, match="0 new tokens"):
        runner.generate([[1]], 0)


def test_missing_surplus_and_misshapen_tensors_are_named() -> None:
    _, checkpoint = small_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    cases = [
        (changed(checkpoint, model__layers__1__mlp__up_proj__weight=None), name),
        (
            changed(checkpoint, model__layers__1__mlp__up_proj__weight=torch.ones(95, 64)),
            r"has shape \(95, 64\)",
        ),
        (changed(checkpoint, lm_head__weight=None), "lm_head.weight is missing"),
        (changed(checkpoint, model__layers__0__self_attn__o_proj__bias=torch.ones(64)), "no place"),
    ]
    for broken, says in cases:
        with pytest.raises(ModelError, match=says):
            load(broken, device="cpu", dtype="float32")


def test_weights_that_are_no_numbers_are_refused() -> None:
    _, checkpoint = small_model("llama")
    nan = torch.full((96, 64), float("nan"))
    with pytest.raises(CorruptFileError):
        load(changed(checkpoint, model__layers__1__mlp__up_proj__weight=nan), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling 'longrope'"),
    ],
)
def test_configs_that_the_decoder_does_not_support_are_refused(config: dict, says: str) -> None:
    _, checkpoint = small_model("qwen2-tied")
    with pytest.raises(UnsupportedError, match=says) as caught:
        load(changed(checkpoint, config), device="cpu")
    assert "--engine transformers" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "linear", "factor": 0}, r"factor (= )?0; it has to be a positive number"),
        ({"rope_type": "yarn", "factor": -2.0}, r"factor (= )?-2.0; it"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "1"}, r"low_freq_factor (= )?'1'; it"),
        ({"rope_type": "su", "factor": 2.0}, "rope scaling 'su' is not supported"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "are rotated whole"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, r"of kinds of layers .full_attention."),
    ],
)
def test_invalid_rope_scalings_are_refused(scaling: dict, says: str) -> None:
    _, checkpoint = small_model("llama")
    with pytest.raises(ModelError, match=says) as caught:
        load(changed(checkpoint, {"rope_parameters": {**scaling, "rope_theta": 1e4}}), device="cpu")
    assert "copy" in str(caught.value.hint)


def test_heads_without_halves_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="heads of 15 cannot be rotated"):
        load(changed(small_model("llama")[1], {"head_dim": 15}), device="cpu")


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_of_more_layers_than_the_config_has_are_another_models(engine: str) -> None:
    _, checkpoint = small_model("llama")
    with pytest.raises(ModelError, match=r"model.layers.1.\S+ has no place in this architecture"):
        load(changed(checkpoint, {"num_hidden_layers": 1}), device="cpu", dtype="float32", engine=engine)


@pytest.mark.parametrize(
    "config",
    [
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "use_sliding_window": True,
            "sliding_window": 8,
        },
        {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    ],
)
def test_sliding_windows_are_the_transformers_engines(config: dict) -> None:
    model, checkpoint = small_model("qwen2-tied", **config)
    windowed = changed(checkpoint, config)
    with pytest.raises(UnsupportedError, match="sliding-window") as caught:
        load(windowed, device="cpu")
    assert "--engine transformers" in str(caught.value.hint)
    engine = load(windowed, device="cpu", dtype="float32", engine="transformers")
    ids = random_ids(20)
    wanted = reference_logits(model, ids)
    cache = engine.new_cache(1, 20)
    torch.testing.assert_close(engine.logits([ids[:12]], cache)[0], wanted[:12], atol=1e-4, rtol=0)
    for place, token in enumerate(ids[12:], 12):
        step = engine.decode(torch.tensor([token]), cache)
        torch.testing.assert_close(step[0], wanted[place], atol=1e-4, rtol=0)


def test_an_unused_window_is_accepted() -> None:
    _, checkpoint = small_model("qwen2-tied")
    unused = {"layer_types": None, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}
    assert load(changed(checkpoint, unused), device="cpu").logits([[1]])[0].shape == (1, 300)


def test_dynamic_rope_is_plain_up_to_its_length_and_refused_beyond() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model, checkpoint = small_model("llama", rope_parameters=scaling, max_position_embeddings=32)
    ids = random_ids(33)
    with torch.inference_mode():
        expected = model(torch.tensor([ids[:32]])).logits[0]
    runner = load(checkpoint, device="cpu", dtype="float32")
    torch.testing.assert_close(runner.logits([ids[:32]])[0], expected, atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="33 tokens are more than the 32"):
        runner.logits([ids])


def test_device_and_dtype_names() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert find_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert find_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    with pytest.raises(UsageError, match="'tpu' is not a device"):
        resolve_device("tpu")
    with pytest.raises(UsageError, match="is not a dtype"):
        find_dtype("int3", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "engine", "device", "found"),
    [
        ("auto", "fast", "cpu", "grouped"),
        ("auto", "fast", "cuda", "sdpa"),
        ("auto", "transformers", "cpu", "sdpa"),
        ("off", "fast", "cpu", "off"),
    ],
)
def test_default_attention(name: str, engine: str, device: str, found: str) -> None:
    assert find_attention(name, engine, torch.device(device)) == found
    with pytest.raises(UsageError, match="no engine 'vllm'"):
        load(Path("anywhere"), engine="vllm")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_cuda_without_a_gpu_is_explained() -> None:
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(UsageError, match="cuda cannot be used: 0 CUDA GPUs found"):
        load(Path("anywhere"), device="cuda")


@pytest.mark.parametrize("engine", ENGINES)
def test_emulated_bfloat16_gets_a_note(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast engine's C kernels widen bfloat16 in registers: nothing is emulated where they run."""
    _, checkpoint = small_model("llama")
    monkeypatch.setenv("QWENQ_CPU", "torch")
    monkeypatch.setattr(door, "compute_dtype", lambda device: torch.float32)
    note = "bfloat16 is emulated: this cpu has no instructions for it"
    found = load(checkpoint, device="cpu", dtype="bfloat16", engine=engine)
    assert found.notes[-1] == note
    assert note not in load(checkpoint, device="cpu", dtype="float32", engine=engine).notes
    monkeypatch.setattr(door, "compute_dtype", lambda device: torch.bfloat16)
    natively = load(checkpoint, device="cpu", dtype="bfloat16", engine=engine)
    assert natively.notes == found.notes[:-1]  # what else is said depends on the CPU


def test_auto_is_bfloat16_in_the_fast_engine_where_c_kernels_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "compute_dtype", lambda device: torch.float32)
    cpu = torch.device("cpu")
    monkeypatch.setattr(door.cpu, "unsupported_reason", lambda: None)
    assert find_dtype("auto", cpu, "fast") is torch.bfloat16
    assert find_dtype("auto", cpu, "transformers") is torch.float32
    monkeypatch.setattr(door.cpu, "unsupported_reason", lambda: "the library is not compiled")
    assert find_dtype("auto", cpu, "fast") is torch.float32
