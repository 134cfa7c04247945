"""A decode step as compiled code: what torch computes in a few hundred calls, for every family and batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from models.plain_qwen_v1 import MemorySource
from runtime.quantised_models import packed_linear, quantised_model
from runtime.small_models import HYBRIDS, random_ids, small_model

from qwenq.errors import UsageError
from qwenq.models.gptq_config import QuantConfig
from qwenq.runtime.engine import FastEngine, load
from qwenq.runtime.quantised_linear import CpuNative

pytestmark = pytest.mark.usefixtures("each_variant")


NEAR = 0.04  # what bfloat16 leaves of models whose random weights make it hard
INT4, INT8 = QuantConfig(bits=4, group_size=32), QuantConfig(bits=8, group_size=32)
FAMILIES = (
    "llama", "llama3-rope", "qwen1.5", "qwen2-tied", "qwen2.5-yarn", "qwen3", "qwen3-moe", "qwen3-moe-partly",
    "qwen3.5", "qwen3.5-moe", "qwen3-next",
)  # fmt: skip


def engine_of(
    family: str, quant: QuantConfig | None = INT4, dtype: str = "bfloat16", **changes: object
) -> FastEngine:
    """An engine; without ``quant``, of weights that bfloat16 holds."""
    sizes = {"hidden_size": 128, "head_dim": 32, **changes}
    if family in HYBRIDS:
        sizes = {"linear_key_head_dim": 32, **sizes}
    if quant is None:
        _, wide = small_model(family, **{"intermediate_size": 128, **sizes})
        rounded = MemorySource({name: wide.read(name).bfloat16() for name in wide.names()})
        made = load(replace(wide, source=rounded), device="cpu", dtype=dtype)
    else:
        made = load(quantised_model(family, quant, **sizes), device="cpu", dtype=dtype)
    assert isinstance(made, FastEngine)
    return made


def in_torch(engine: FastEngine) -> FastEngine:
    """Let an engine's steps be torch's."""
    engine.decoder.compiled = None
    return engine


def steps(engine: FastEngine, prompts: list[list[int]], count: int, seed: int = 3) -> torch.Tensor:
    """Logits after each of so many steps, [steps, rows, vocabulary]."""
    cache = engine.new_cache(len(prompts), 80)
    engine.prefill(prompts, cache)
    ids = torch.tensor([random_ids(len(prompts), seed + step) for step in range(count)])
    return torch.stack([engine.decode(row, cache) for row in ids])


@pytest.mark.parametrize("quant", [INT4, INT8, None], ids=["int4", "int8", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_are_nearer_to_float32_than_steps_in_torch(
    family: str, quant: QuantConfig | None
) -> None:
    prompts = [random_ids(length, length) for length in (3, 1, 17)]
    engine = engine_of(family, quant)
    assert engine.implementation.endswith("decode steps compiled for this CPU")
    assert not [note for note in engine.notes if "not used" in note]
    exact = steps(in_torch(engine_of(family, quant, dtype="float32")), prompts, 5)
    found, called = steps(engine, prompts, 5), steps(in_torch(engine_of(family, quant)), prompts, 5)
    # The median over tokens: after a rounded prompt, a router may choose another expert for one of them, and
    # for another one in torch, so that the medians of a mixture are a little apart either way.
    errors = ((logits - exact).norm(dim=-1) / exact.norm(dim=-1) for logits in (found, called))
    error, rounding = (each.median() for each in errors)
    assert error < NEAR
    assert error < (1.2 if engine.decoder.spec.shape.experts else 1.1) * rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_of_float32_equal_steps_in_torch(family: str) -> None:
    prompts = [random_ids(length, length) for length in (3, 1, 17)]
    engine = engine_of(family, None, dtype="float32")
    assert engine.implementation.endswith("decode steps compiled for this CPU")
    found = steps(engine, prompts, 5)
    torch.testing.assert_close(found, steps(in_torch(engine), prompts, 5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, CpuNative.many_rows - 1, CpuNative.many_rows])
def test_rows_of_a_batch_equal_rows_alone(rows: int) -> None:
    engine = engine_of("qwen3")
    prompts = [random_ids(1 + row % 7, row) for row in range(rows)]
    together = steps(engine, prompts, 3)
    ids = torch.tensor([random_ids(rows, 3 + step) for step in range(3)])
    for row in {0, rows // 2, rows - 1}:
        cache = engine.new_cache(1, 80)
        engine.prefill([prompts[row]], cache)
        alone = torch.cat([engine.decode(ids[step, row : row + 1], cache) for step in range(3)])
        error = (together[:, row] - alone).norm() / alone.norm()
        assert error < NEAR  # prompts are encoded in bfloat16, in batches of other sizes


@torch.inference_mode()
@pytest.mark.parametrize("quant", [INT4, None], ids=["int4", "bf16"])
@pytest.mark.parametrize("rows", [2, 5, CpuNative.many_rows - 1])
def test_rows_that_share_experts_or_have_their_own_equal_rows_alone(
    rows: int, quant: QuantConfig | None
) -> None:
    engine = engine_of("qwen3-moe", quant)
    cache = engine.new_cache(rows, 16)
    engine.prefill([random_ids(1 + row % 7, row) for row in range(rows)], cache)
    some, ids = (0, rows // 2, rows - 1), torch.tensor(random_ids(rows, 9)).unsqueeze(1)
    parts = [cache.take([row]) for row in some]
    together = engine.forward(ids, [1] * rows, cache)
    for row, part in zip(some, parts, strict=True):
        assert torch.equal(engine.forward(ids[row : row + 1], [1], part)[0], together[row])


@pytest.mark.parametrize("length", [15, 16, 17, 63, 64, 65, 79])
def test_slots_at_the_edges_of_registers(length: int) -> None:
    """Scores are summed for 64 and then for 16 slots at a time; the last are filled up."""
    ids = random_ids(length, 1)
    exact, found = in_torch(engine_of("qwen2-tied", dtype="float32")), engine_of("qwen2-tied")
    for engine in (exact, found):
        cache = engine.new_cache(1, 80)
        engine.prefill([ids], cache)
        engine.logits_after = engine.decode(torch.tensor([7]), cache)  # type: ignore[attr-defined]
    a, b = exact.logits_after, found.logits_after  # type: ignore[attr-defined]
    assert (a - b).norm() / a.norm() < NEAR


def test_rows_that_reach_into_different_stretches_of_slots() -> None:
    """A stretch is 256 slots: one row ends in the first, others at its edges, one in the third."""
    lengths = (3, 254, 255, 256, 530)
    prompts = [random_ids(length, length) for length in lengths]
    engine = engine_of("qwen2-tied")
    compiled = engine.decoder.compiled
    assert compiled is not None
    first = engine.new_cache(len(prompts), 540)
    engine.prefill(prompts, first)
    second, logits = first.take(range(len(prompts))), []
    for cache, used in ((first, compiled), (second, None)):
        engine.decoder.compiled = used
        logits.append(torch.stack([engine.decode(torch.arange(5) + step, cache) for step in range(3)]))
    errors = (logits[1] - logits[0]).norm(dim=(0, 2)) / logits[0].norm(dim=(0, 2))  # of each row
    assert (errors < NEAR).all()


def test_a_cache_may_grow_be_rewound_and_lose_rows() -> None:
    engine = engine_of("qwen3")
    prompts = [random_ids(length, length) for length in (5, 9, 2)]
    cache = engine.new_cache(3, 16)
    engine.prefill(prompts, cache)
    first = engine.decode(torch.tensor([1, 2, 3]), cache)
    cache.rewind([5, 9, 2])
    assert torch.equal(engine.decode(torch.tensor([1, 2, 3]), cache), first)
    cache.reserve(200)
    cache.rewind([5, 9, 2])
    assert torch.equal(engine.decode(torch.tensor([1, 2, 3]), cache), first)
    with torch.inference_mode():
        order = cache.keep([0, 2])
    then = engine.decode(torch.tensor([8, 9]), cache)
    for row, was in enumerate(order):
        alone = engine.new_cache(1, 16)
        engine.prefill([prompts[was]], alone)
        engine.decode(torch.tensor([was + 1]), alone)
        expected = engine.decode(torch.tensor([8 + row]), alone)[0]
        assert (then[row] - expected).norm() / expected.norm() < NEAR


def test_a_full_row_is_refused() -> None:
    engine = engine_of("llama")
    cache = engine.new_cache(1, 4)
    engine.prefill([[1, 2, 3, 4]], cache)
    with pytest.raises(UsageError, match="5 tokens do not fit into a cache of 4"):
        engine.decode(torch.tensor([1]), cache)


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe-partly"])
def test_greedy_text_is_the_same_with_any_number_of_threads(family: str) -> None:
    engine, threads = engine_of(family), torch.get_num_threads()
    texts = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            texts.append(engine.generate([[5, 6]], 24, exact_tokens=True).answers[0].ids)
    finally:
        torch.set_num_threads(threads)
    assert texts[0] == texts[1] == texts[2]


def test_another_thread_of_python_gets_the_same_text() -> None:
    """OpenMP keeps the number of its threads for each thread that asks; what they write to must have room."""
    engine = engine_of("qwen3")
    here = engine.generate([[5, 6]], 8, exact_tokens=True).answers[0].ids
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: engine.generate([[5, 6]], 8, exact_tokens=True).answers[0].ids).result()
    assert there == here


@pytest.mark.parametrize(
    ("family", "quant", "changes", "reason"),
    [
        ("llama-biases", INT4, {}, "there are biases behind attention or in the MLP"),
        ("qwen3", QuantConfig(bits=4, group_size=32, sym=False), {}, "zero points off the middle"),
        ("qwen3", QuantConfig(bits=4, group_size=32, desc_act=True), {}, "columns in activation order"),
        ("qwen3", INT4, {"head_dim": 16}, "sizes are not multiples of 32"),
    ],
)
def test_unsupported_models_get_a_note_with_the_reason(
    family: str, quant: QuantConfig, changes: dict[str, int], reason: str
) -> None:
    engine = engine_of(family, quant, **changes)
    assert "decode steps compiled" not in engine.implementation
    (note,) = engine.notes
    assert note.startswith("the faster compiled decode step is not used because ")
    assert reason in note
    assert torch.isfinite(steps(engine, [[1, 2]], 2)).all()


def test_experts_may_differ_in_bits_but_not_in_their_groups() -> None:
    name = "model.layers.0.mlp.experts.1.down_proj"
    for own, reason in ((INT8, None), (QuantConfig(bits=4, group_size=64), "groups of unlike size")):
        base = quantised_model("qwen3-moe", INT4, hidden_size=128, moe_intermediate_size=64)
        weight = small_model("qwen3-moe", hidden_size=128, moe_intermediate_size=64)[1].read(f"{name}.weight")
        tensors = {**base.source.tensors, **packed_linear(weight, own).tensors(name)}  # type: ignore[attr-defined]
        rule = {f"+:.*{name}$": {"bits": own.bits, "group_size": own.group_size}}
        quant = {**base.config["quantization_config"], "dynamic": rule}
        mixed = replace(
            base, config={**base.config, "quantization_config": quant}, source=MemorySource(tensors)
        )
        engine = load(mixed, device="cpu", dtype="bfloat16")
        assert isinstance(engine, FastEngine)
        assert (engine.decoder.compiled is None) is bool(reason)
        assert [note for note in engine.notes if reason and reason in note] == list(engine.notes)
        exact = load(mixed, device="cpu", dtype="float32")
        assert isinstance(exact, FastEngine)
        found, expected = (steps(one, [[1, 2]], 2) for one in (engine, exact))
        assert (found - expected).norm() / expected.norm() < NEAR


def test_threads_of_python_that_share_an_engine_answer_as_one() -> None:
    engine = load(
        quantised_model("qwen3", QuantConfig(bits=4, group_size=32)), device="cpu", dtype="bfloat16"
    )
    prompts = [random_ids(5, seed) for seed in range(4)]
    expected = [engine.generate([prompt], 24).answers for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: engine.generate([prompt], 24).answers, prompts))
    assert found == expected


def test_states_of_another_size_are_refused_before_c_sees_them() -> None:
    engine = engine_of("qwen3.5")
    cache = engine.new_cache(1, 16)
    engine.prefill([[1, 2, 3]], cache)
    convolution, recurrent = cache.states[0]
    for wrong in ((convolution[:, 1:], recurrent), (convolution, recurrent.bfloat16())):
        cache.states[0] = wrong
        with pytest.raises(ValueError, match=r"states of a .*, not contiguous"):
            engine.decode(torch.tensor([1]), cache)
