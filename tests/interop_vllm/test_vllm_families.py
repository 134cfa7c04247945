"""Mixtures, hybrids and bits by module: what vLLM's CPU build computes of them, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import compared, own_product, real_prompts, tiny, verdict
from vllm_client import Record, Runner, compare, has_tiles, own_answer, refusal

from qwenq.conversion import convert

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, experts in 16 bits": ("qwen3_moe", {"module_bits": {"experts": 16}}),
    "qwen3_next, experts in 16 bits": ("qwen3_next", {"module_bits": {"experts": 16}}),
    "qwen3_5_text": ("qwen3_5_text", {}),
    "qwen3_5, with its vision tower": ("qwen3_5", {}),
}
"""What it runs by itself: linear attention in bfloat16 only."""


@own_product
@pytest.mark.parametrize("name", WHOLE)
def test_int4_beside_experts_and_linear_attention(
    tmp_path: Path, vllm: Runner, record: Record, name: str
) -> None:
    """It is as far from float32 as our own engine in bfloat16 is."""
    family, settings = WHOLE[name]
    folder, prompts = tiny(tmp_path, family, **settings)
    assert verdict(folder).loads
    own = own_answer(folder, prompts, "bfloat16", top=-1)
    ours = compare(folder, prompts, own)
    record.add(name, own, "qwenq", "bfloat16", ours)
    found = compared(vllm, record, name, folder, prompts, "bfloat16", plain=False)
    assert found.mean < 2 * ours.mean
    assert found.largest < 3 * ours.largest


PLAIN: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_moe Int4": ("qwen3_moe", {}, "float32"),
    "qwen3_moe Int8": ("qwen3_moe", {"bits": 8}, "float32"),
    "qwen3_moe, attention in 8 bits": ("qwen3_moe", {"module_bits": {"self_attn": 8}}, "float32"),
    "qwen3_next Int4": ("qwen3_next", {}, "bfloat16"),
    "qwen3_5_moe Int4, with its vision tower": ("qwen3_5_moe", {}, "bfloat16"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_experts_in_plain_torch(tmp_path: Path, vllm: Runner, record: Record, name: str) -> None:
    """In float32 nothing is rounded: it is the same model."""
    family, settings, dtype = PLAIN[name]
    folder, prompts = tiny(tmp_path, family, **settings)
    assert verdict(folder).loads
    found = compared(vllm, record, name, folder, prompts, dtype, plain=True)
    assert found.largest < (1e-3 if dtype == "float32" else 0.2)


def test_experts_converted_to_compressed_tensors(tmp_path: Path, vllm: Runner, record: Record) -> None:
    folder, prompts = tiny(tmp_path, "qwen3_moe")
    convert(folder, tmp_path / "ct", to="compressed-tensors")
    answer = vllm.ask(tmp_path / "ct", prompts, dtype="float32", plain=True, top=-1)
    found = compare(folder, prompts, answer)
    record.add("qwen3_moe Int4, as compressed-tensors", answer, "vLLM, plain", "float32", found)
    assert found.largest < 1e-3


def test_the_bundled_model_in_4_8_and_16_bits(mixed: Path, vllm: Runner, record: Record) -> None:
    name = "SmolLM2-135M-Instruct, 4, 8 and 16 bits by module"
    found = compared(vllm, record, name, mixed, real_prompts(mixed), "float32", plain=True, top=20)
    assert found.largest < 1e-3
    assert found.same_greedy == found.generated


EXPERTS = "No WNA16 MoE backend supports the deployment configuration"
INT8 = "uint8b128"
REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "qwen3_moe Int4": ("qwen3_moe", {}, "bfloat16", EXPERTS),
    "qwen3_moe Int8": ("qwen3_moe", {"bits": 8}, "bfloat16", INT8),
    "qwen3_moe, experts in 8 bits": ("qwen3_moe", {"module_bits": {"experts": 8}}, "bfloat16", EXPERTS),
    "qwen3_moe, attention in 8 bits": ("qwen3_moe", {"module_bits": {"self_attn": 8}}, "bfloat16", INT8),
    "qwen3_next Int4": ("qwen3_next", {}, "bfloat16", EXPERTS),
    "qwen3_5_text in float16": ("qwen3_5_text", {}, "float16", "CPU GDN attention requires BF16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cpu_build_refuses(tmp_path: Path, vllm: Runner, record: Record, name: str) -> None:
    family, settings, dtype, words = REFUSED[name]
    if words == EXPERTS and has_tiles():
        pytest.skip("this CPU has AMX, with which vLLM runs Int4 experts: not tried yet")
    folder, prompts = tiny(tmp_path, family, **settings)
    said = refusal(vllm.ask(folder, prompts, dtype=dtype))
    assert words in said
    record.refuse(name, dtype, words)
    assert verdict(folder).loads  # on a GPU, and a note says what of a CPU
    assert any("CPU build" in note for note in verdict(folder).notes)


def test_8_bits_by_module_are_refused_in_the_bundled_model(mixed: Path, vllm: Runner, record: Record) -> None:
    assert INT8 in refusal(vllm.ask(mixed, [[1, 2, 3]]))
    record.refuse("SmolLM2-135M-Instruct, 4, 8 and 16 bits by module", "bfloat16", INT8)
