"""Both engines over packed weights: what they compute, what they say they run, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.plain_qwen_v1 import MemorySource
from runtime.quantised_models import packed_linear, quantised_model
from runtime.small_models import random_ids, small_model

from qwenq.compute import cpu
from qwenq.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource
from qwenq.runtime.engine import Engine, load

ENGINES = ("fast", "transformers")
INT4 = QuantConfig(bits=4, group_size=32)
CASES = {
    "int4": INT4,
    "int8": QuantConfig(bits=8, group_size=64),
    "int4-whole-rows": QuantConfig(bits=4, group_size=-1),
    "int4-asymmetric": QuantConfig(bits=4, group_size=32, sym=False),
    "int4-act-order": QuantConfig(bits=4, group_size=32, desc_act=True),
    "int4-v2": QuantConfig(bits=4, group_size=32, checkpoint_format="gptq_v2"),
    "int2": QuantConfig(bits=2, group_size=32),
}
"""What the compiled product runs."""
INT3 = {
    "int3": QuantConfig(bits=3, group_size=32),
    "int3-act-order": QuantConfig(bits=3, group_size=32, sym=False, desc_act=True),
}
needs_c = pytest.mark.skipif(cpu.unsupported_reason() is not None, reason=f"{cpu.unsupported_reason()}")


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights as numbers."""
    quant = QuantConfig.read(checkpoint.config)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    source = DequantisedSource(checkpoint.source, quant, torch.float32)
    tensors = {name: source.read(name) for name in source.names()}
    return Checkpoint(Path("in-memory"), config, MemorySource(tensors))


def logits(engine: Engine) -> torch.Tensor:
    """Of prompts of 1 and 40 tokens, and of three decode steps after them; all in one."""
    prompts = [random_ids(1, 5), random_ids(40, 6)]
    cache = engine.new_cache(2, 48)
    parts = engine.logits(prompts, cache)
    parts += [engine.decode(torch.tensor([7, 8 + step]), cache) for step in range(3)]
    return torch.cat(parts)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [*CASES, *INT3])
@pytest.mark.parametrize("family", ["qwen3", "qwen1.5"])
def test_float32_logits_are_those_of_the_weights_that_the_integers_stand_for(
    family: str, case: str, engine: str
) -> None:
    checkpoint = quantised_model(family, {**CASES, **INT3}[case])
    found = load(checkpoint, device="cpu", dtype="float32", engine=engine)
    expected = load(plain(checkpoint), device="cpu", dtype="float32", engine="transformers")
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-3, rtol=0)
    assert "kernel dequantise" in found.implementation


@needs_c
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_the_integer_product_is_as_near_as_bfloat16_is(case: str, engine: str) -> None:
    checkpoint = quantised_model("qwen3", CASES[case])
    found = load(checkpoint, device="cpu", dtype="bfloat16", engine=engine)
    assert "kernel cpu-native" in found.implementation
    assert not [note for note in found.notes if note.startswith("the faster kernel")]
    exact = logits(load(checkpoint, device="cpu", dtype="float32", engine=engine))
    reference = load(checkpoint, device="cpu", dtype="bfloat16", engine=engine, kernel="dequantise")
    error, rounding = ((logits(one) - exact).norm() / exact.norm() for one in (found, reference))
    assert error < 2 * rounding


def test_the_implementation_and_the_notes_name_what_runs_and_what_does_not() -> None:
    engine = load(quantised_model("qwen3", INT4), device="cpu", dtype="float32")
    for part in ("fast", "kernel dequantise", "attention grouped", f"torch {torch.__version__}"):
        assert part in engine.implementation
    kernels = [note for note in engine.notes if note.startswith("the faster kernel ")]
    assert kernels == [
        "the faster kernel cpu-native is not used because it computes in bfloat16, not in float32"
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_kernel_that_cannot_is_refused_and_not_replaced(engine: str) -> None:
    checkpoint = quantised_model("qwen3", INT4)
    with pytest.raises(UnsupportedError, match="cpu-native cannot run this model here: it computes in bf"):
        load(checkpoint, device="cpu", dtype="float32", engine=engine, kernel="cpu-native")
    with pytest.raises(UnsupportedError, match="this model is not quantised"):
        load(small_model("qwen3")[1], device="cpu", dtype="bfloat16", engine=engine, kernel="cpu-native")
    with pytest.raises(UsageError, match="no kernel 'exllama'"):
        load(checkpoint, device="cpu", engine=engine, kernel="exllama")


@needs_c
def test_the_int8_head_is_an_option_of_the_fast_engine() -> None:
    checkpoint = quantised_model("qwen3", INT4)
    exact = load(checkpoint, device="cpu", dtype="bfloat16")
    rounded = load(checkpoint, device="cpu", dtype="bfloat16", head="int8")
    assert "int8 head" in rounded.implementation
    assert "int8 head" not in exact.implementation
    error = (logits(rounded) - logits(exact)).norm() / logits(exact).norm()
    assert 0 < error < 0.02
    with pytest.raises(UsageError, match="transformers has no head") as caught:
        load(checkpoint, device="cpu", dtype="bfloat16", engine="transformers", head="int8")
    assert caught.value.hint == "use as-is, or --engine fast"
    with pytest.raises(UnsupportedError, match="computes in bfloat16"):
        load(checkpoint, device="cpu", dtype="float32", head="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_steps_give_what_a_prompt_gives(dtype: str) -> None:
    checkpoint = quantised_model("qwen3", INT4)
    grouped = load(checkpoint, device="cpu", dtype=dtype, attention="grouped")
    whole = load(checkpoint, device="cpu", dtype=dtype, attention="sdpa")
    found, expected = logits(grouped), logits(whole)
    tolerance = 1e-4 if dtype == "float32" else 0.02 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [3, 8])
def test_a_quantised_head_is_the_weights_that_it_stands_for(bits: int, engine: str) -> None:
    """As GPTQModel and AutoRound write it: ``lm_head`` is true, and a rule may have its bits."""
    checkpoint = quantised_model("qwen3", INT4, vocab_size=320, tie_word_embeddings=False)
    packed = packed_linear(checkpoint.read("lm_head.weight"), QuantConfig(bits=bits, group_size=32))
    changed = broken(checkpoint, "lm_head.weight", None)
    for name, tensor in packed.tensors("lm_head").items():
        changed = broken(changed, name, tensor)
    quant = {**checkpoint.config["quantization_config"], "lm_head": True}
    quant["dynamic"] = {"lm_head": {"bits": bits}}
    changed = replace(changed, config={**checkpoint.config, "quantization_config": quant})
    found = load(changed, device="cpu", dtype="float32", engine=engine)
    expected = load(plain(changed), device="cpu", dtype="float32", engine="transformers")
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-3, rtol=0)


def broken(checkpoint: Checkpoint, name: str, tensor: torch.Tensor | None) -> Checkpoint:
    tensors = {**checkpoint.source.tensors, name: tensor}
    return replace(checkpoint, source=MemorySource({key: t for key, t in tensors.items() if t is not None}))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_broken_quantised_folder_is_refused_by_name(engine: str) -> None:
    checkpoint, module = quantised_model("qwen3", INT4), "model.layers.1.mlp.down_proj"

    def refused(changed: Checkpoint, error: type[ModelError]) -> str:
        with pytest.raises(error) as caught:
            load(changed, device="cpu", dtype="float32", engine=engine)
        return str(caught.value)

    said = refused(broken(checkpoint, f"{module}.scales", None), ModelError)
    assert "lacks scales" in said
    assert module in said
    short = checkpoint.read(f"{module}.scales")[:-1]
    said = refused(broken(checkpoint, f"{module}.scales", short), ModelError)
    assert "group_size 32 make it [4, 64]" in said
    nan = checkpoint.read(f"{module}.scales").clone().fill_(float("nan"))
    said = refused(broken(checkpoint, f"{module}.scales", nan), CorruptFileError)
    assert f"{module}.scales" in said
    wrong = checkpoint.read(f"{module}.g_idx") + 7
    assert "g_idx runs from 7" in refused(broken(checkpoint, f"{module}.g_idx", wrong), ModelError)
    quant = {**checkpoint.config["quantization_config"], "bits": 8}
    changed = replace(checkpoint, config={**checkpoint.config, "quantization_config": quant})
    assert "bits 8 and group_size 32" in refused(changed, ModelError)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("stored", "claimed"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_zero_points_of_the_other_format_are_found_by_their_value(
    stored: str, claimed: str, engine: str
) -> None:
    """Read as they are claimed to be, every weight would be one step off: the model then writes "!!!!"."""
    checkpoint = quantised_model("qwen3", replace(INT4, checkpoint_format=stored))
    quant = {**checkpoint.config["quantization_config"], "checkpoint_format": claimed}
    changed = replace(checkpoint, config={**checkpoint.config, "quantization_config": quant})
    with pytest.raises(ModelError, match="zero points run from"):
        load(changed, device="cpu", dtype="bfloat16", engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("part", "change", "error", "says"),
    [
        ("qweight", None, ModelError, "lacks qweight"),
        ("weight", lambda _: torch.zeros(64, 128), ModelError, "twice: as weight and as qweight"),
        ("scales", torch.zeros_like, CorruptFileError, "scales holds nothing but zeros"),
        ("qweight", lambda words: words.long(), ModelError, "qweight is torch.int64"),
        ("scales", lambda scales: scales.int(), ModelError, "scales is torch.int32"),
        ("g_idx", lambda places: places - 1, ModelError, "g_idx runs from -1"),
    ],
)
def test_damage_is_found_and_its_module_named(
    part: str, change: Callable | None, error: type[ModelError], says: str, engine: str
) -> None:
    checkpoint, module = quantised_model("qwen3", INT4), "model.layers.1.mlp.down_proj"
    name = f"{module}.{part}"
    tensor = None if change is None else change(checkpoint.source.tensors.get(name))
    with pytest.raises(error, match=says) as caught:
        load(broken(checkpoint, name, tensor), device="cpu", dtype="bfloat16", engine=engine)
    assert module in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_are_no_floats_are_refused(engine: str) -> None:
    checkpoint, name = quantised_model("qwen3", INT4), "model.norm.weight"
    for dtype in (torch.int64, torch.bool, torch.complex64):
        changed = broken(checkpoint, name, checkpoint.read(name).to(dtype))
        with pytest.raises(ModelError, match=f"{name} is {dtype}, and a weight is a float"):
            load(changed, device="cpu", dtype="float32", engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_uneven_groups_run_dequantised_with_a_note(engine: str) -> None:
    checkpoint, module = quantised_model("qwen3", INT4), "model.layers.1.mlp.down_proj"
    uneven = checkpoint.read(f"{module}.g_idx").clone()
    uneven[:3] = 1
    changed = broken(checkpoint, f"{module}.g_idx", uneven)
    found = load(changed, device="cpu", dtype="bfloat16", engine=engine)
    assert "kernel dequantise" in found.implementation
    reason = f"the groups of {module} differ in size"
    if cpu.unsupported_reason() is None:
        assert f"the faster kernel cpu-native is not used because {reason}" in found.notes
        with pytest.raises(UnsupportedError, match=f"cpu-native cannot run this model here: {reason}"):
            load(changed, device="cpu", dtype="bfloat16", engine=engine, kernel="cpu-native")
    exact = load(changed, device="cpu", dtype="float32", engine=engine)
    expected = load(plain(changed), device="cpu", dtype="float32", engine="transformers")
    torch.testing.assert_close(logits(exact), logits(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("model.embed_tokens", "model.embed_tokens is quantised, and is not a linear layer"),
        ("model.layers.7.mlp.down_proj", "model.layers.7.mlp.down_proj.weight has no place"),
    ],
)
def test_the_transformers_engine_swaps_linear_layers_alone(module: str, says: str) -> None:
    checkpoint = quantised_model("llama", INT4, vocab_size=304)
    packed = packed_linear(checkpoint.read("model.embed_tokens.weight"), INT4)
    changed = broken(checkpoint, f"{module}.weight", None)
    for name, tensor in packed.tensors(module).items():
        changed = broken(changed, name, tensor)
    with pytest.raises(ModelError, match=says):
        load(changed, device="cpu", dtype="float32", engine="transformers")


@pytest.mark.parametrize("engine", ENGINES)
def test_biases_that_the_config_asks_for_count_also_where_they_are_zero(engine: str) -> None:
    checkpoint = quantised_model("llama-biases", INT4)
    names = [name for name in checkpoint.names() if name.endswith(("o_proj.bias", "down_proj.bias"))]
    assert len(names) == 4
    for name in names:
        checkpoint = broken(checkpoint, name, torch.zeros_like(checkpoint.read(name)))
    found = load(checkpoint, device="cpu", dtype="float32", engine=engine)
    quant = QuantConfig.read(checkpoint.config)
    source = DequantisedSource(checkpoint.source, quant, torch.float32, checkpoint.config)
    tensors = {name: source.read(name) for name in source.names()}
    assert set(names) <= tensors.keys()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    dense = Checkpoint(Path("in-memory"), config, MemorySource(tensors))
    expected = load(dense, device="cpu", dtype="float32", engine="transformers")
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-3, rtol=0)
