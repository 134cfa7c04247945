"""vLLM loads what qwenq wrote, and computes what our engine computes; or refuses what the rules refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from regrouped import regrouped
from small_models import compared, own_product, real_prompts, tiny, verdict
from vllm_client import Record, Runner, compare, own_answer, refusal

from qwenq.conversion import convert

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]


@own_product
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int4_of_the_bundled_model(int4: Path, vllm: Runner, record: Record, dtype: str) -> None:
    """It is as far from float32 as our own engine in that dtype is."""
    name, prompts = "SmolLM2-135M-Instruct Int4", real_prompts(int4)
    ours = compare(int4, prompts, own := own_answer(int4, prompts, dtype))
    record.add(name, own, "qwenq", dtype, ours)
    found = compared(vllm, record, name, int4, prompts, dtype, plain=False, top=20)
    assert found.mean < 1.5 * ours.mean
    assert found.largest < 2 * ours.largest
    assert found.same_top > ours.same_top - 0.03


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bundled_model_in_plain_torch(
    request: pytest.FixtureRequest, vllm: Runner, record: Record, bits: int
) -> None:
    """In float32 nothing is rounded: it is the same model."""
    folder = request.getfixturevalue(f"int{bits}")
    name = f"SmolLM2-135M-Instruct Int{bits}"
    found = compared(vllm, record, name, folder, real_prompts(folder), "float32", plain=True, top=20)
    assert found.largest < 1e-3
    assert found.same_greedy == found.generated


def test_int8_is_refused_by_the_cpu_build_and_the_rules_note_it(int8: Path, vllm: Runner) -> None:
    assert "uint8b128" in refusal(vllm.ask(int8, [[1, 2, 3]]))
    assert verdict(int8).loads
    assert any("CPU build" in note for note in verdict(int8).notes)


DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, biases, tied head": ("qwen2", {}),
    "qwen2, biases, untied head": ("qwen2", {"head": {"tie_word_embeddings": False}}),
    "qwen3": ("qwen3", {}),
    "qwen3, groups of whole rows": ("qwen3", {"group_size": -1}),
    "qwen3, attention in 16 bits": ("qwen3", {"module_bits": {"self_attn": 16}}),
}


@own_product
@pytest.mark.parametrize("name", DENSE)
def test_dense_models(tmp_path: Path, vllm: Runner, record: Record, name: str) -> None:
    family, settings = DENSE[name]
    folder, prompts = tiny(tmp_path, family, **settings)
    assert verdict(folder).loads
    assert compared(vllm, record, name, folder, prompts, "float16", plain=False).largest < 0.05


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, biases": ("qwen2", {}),
    "qwen3, attention in 8 bits": ("qwen3", {"module_bits": {"self_attn": 8}}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_bits_by_module_in_plain_torch(tmp_path: Path, vllm: Runner, record: Record, name: str) -> None:
    family, settings = PLAIN[name]
    folder, prompts = tiny(tmp_path, family, **settings)
    assert verdict(folder).loads
    assert compared(vllm, record, name, folder, prompts, "float32", plain=True).largest < 1e-3


@pytest.mark.parametrize("family", ["qwen3"])
def test_converted_to_compressed_tensors(tmp_path: Path, vllm: Runner, record: Record, family: str) -> None:
    folder, prompts = tiny(tmp_path, family, module_bits={"self_attn": 8})
    convert(folder, tmp_path / "ct", to="compressed-tensors")
    answer = vllm.ask(tmp_path / "ct", prompts, dtype="float32", plain=True, top=-1)
    found = compare(folder, prompts, answer)
    name = f"{family}, attention in 8 bits, as compressed-tensors"
    record.add(name, answer, "vLLM, plain", "float32", found)
    assert found.largest < 1e-3


def test_free_zero_points_are_refused(tmp_path: Path, vllm: Runner) -> None:
    folder, prompts = tiny(tmp_path, "qwen3", sym=False, any_engine=True)
    assert not verdict(folder).loads
    assert "sym=False" in refusal(vllm.ask(folder, prompts))


def test_groups_of_16_are_refused(tmp_path: Path, vllm: Runner) -> None:
    folder, prompts = tiny(tmp_path, "qwen3", group_size=32)
    assert not verdict(regrouped(folder, 16)).loads
    assert "group_size" in refusal(vllm.ask(folder, prompts))
