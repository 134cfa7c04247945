"""Mixtures, hybrids and bits by module: what vLLM's CPU build computes of them, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import compared, own_product, tiny, verdict
from vllm_client import Record, Runner, compare, has_tiles, own_answer, refusal

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, experts in 16 bits": ("qwen3_moe", {"module_bits": {"experts": 16}}),
    "qwen3_next, experts in 16 bits": ("qwen3_next", {"module_bits": {"experts": 16}}),
    "qwen3_5_text, all in 4 bits": ("qwen3_5_text", {"module_bits": {"linear_attn": 4}}),
}
"""What it runs by itself, linear attention included: in bfloat16 only."""


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


PLAIN: dict[str, dict[str, Any]] = {
    "qwen3_moe Int4": {},
    "qwen3_moe Int8": {"bits": 8},
    "qwen3_moe, attention in 8 bits": {"module_bits": {"self_attn": 8}},
}


@pytest.mark.parametrize("name", PLAIN)
def test_experts_in_plain_torch(tmp_path: Path, vllm: Runner, record: Record, name: str) -> None:
    """In float32 nothing is rounded: it is the same model."""
    folder, prompts = tiny(tmp_path, "qwen3_moe", **PLAIN[name])
    assert verdict(folder).loads
    found = compared(vllm, record, name, folder, prompts, "float32", plain=True)
    assert found.largest < 1e-3
    assert found.same_greedy == found.generated


def test_linear_attention_in_8_bits_in_plain_torch(tmp_path: Path, vllm: Runner, record: Record) -> None:
    """What `quantize` makes of Qwen3.5; linear attention itself is vLLM's, which has it in bfloat16 only."""
    folder, prompts = tiny(tmp_path, "qwen3_5_text")
    assert verdict(folder).loads
    name = "qwen3_5_text Int4, linear attention in 8 bits"
    own = own_answer(folder, prompts, "bfloat16", top=-1)
    ours = compare(folder, prompts, own)
    record.add(name, own, "qwenq", "bfloat16", ours)
    found = compared(vllm, record, name, folder, prompts, "bfloat16", plain=True)
    assert found.mean < 2 * ours.mean
    assert found.largest < 3 * ours.largest


EXPERTS = "No WNA16 MoE backend supports the deployment configuration"
INT8 = "uint8b128"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_moe Int4": ("qwen3_moe", {}, EXPERTS),
    "qwen3_moe, attention in 8 bits": ("qwen3_moe", {"module_bits": {"self_attn": 8}}, INT8),
    "qwen3_5_text Int4, linear attention in 8 bits": ("qwen3_5_text", {}, INT8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cpu_build_refuses(tmp_path: Path, vllm: Runner, record: Record, name: str) -> None:
    family, settings, words = REFUSED[name]
    if words == EXPERTS and has_tiles():
        pytest.skip("this CPU has AMX, with which vLLM runs Int4 experts: not tried yet")
    folder, prompts = tiny(tmp_path, family, **settings)
    assert words in refusal(vllm.ask(folder, prompts))
    record.refuse(name, "bfloat16", words)
    assert verdict(folder).loads  # on a GPU; a note says what of a CPU
    assert any("CPU build" in note for note in verdict(folder).notes)


def test_dynamic_is_passed_over_for_experts_of_no_whole_groups(
    tmp_path: Path, vllm: Runner, record: Record
) -> None:
    """Experts in 16 bits, which it builds as Int4 all the same; `quantize` refuses such settings."""
    if has_tiles():
        pytest.skip("this CPU has AMX, with which vLLM builds Int4 experts and fails later: not tried yet")
    settings = {"module_bits": {"experts": 16}, "group_size": 64, "any_engine": True}
    folder, prompts = tiny(tmp_path, "qwen3_moe", head={"moe_intermediate_size": 96}, **settings)
    (problem,) = verdict(folder).problems
    assert "no whole number of groups of 64: then it passes over dynamic" in problem.reason
    assert EXPERTS in refusal(vllm.ask(folder, prompts))
    record.refuse("qwen3_moe, experts in 16 bits, 96 wide, in groups of 64", "bfloat16", EXPERTS)
