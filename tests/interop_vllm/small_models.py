"""Small models to hold vLLM against our engine with, and what is asked of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline import run
from tiny_families import random_tokens, write_calibration, write_family
from tiny_published import FAMILIES, write_published
from vllm_client import Compared, Record, Runner, compare, has_product

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.tokenizer import load_tokenizer
from qwenq.publishing.engines import Verdict, engine_verdicts, read_gptq_folder

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at a lower temperature on a mountain because",
)
LENGTH = 100  # tokens of a random prompt: more than the chunk of 64 in which linear attention reads them
# Of a random model that vLLM can run: heads that its attention knows, widths that its product takes.
DENSE_SIZES = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 192}
# Experts of whole groups: with others vLLM takes another path, which does not look `dynamic` up. Heads of
# linear attention have the width of published ones; its kernels know 64 and 128.
SIZES = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 128}
HYBRID_SIZES = {**SIZES, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**HYBRID_SIZES, "shared_expert_intermediate_size": 64, "rope_parameters": _ROTARY},
    "qwen3_5_text": {
        **HYBRID_SIZES,
        "rope_parameters": {**_ROTARY, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    },
}
own_product = pytest.mark.skipif(
    not has_product(),
    reason="vLLM's product of Int4 weights needs AVX-512; plain torch takes it in other tests",
)


def tiny(tmp_path: Path, family: str, **settings: Any) -> tuple[Path, list[list[int]]]:
    """A quantised random model, and prompts for it."""
    head = settings.pop("head", {})
    if family in FAMILIES:
        model = write_published(tmp_path / "m", family, **{**HYBRIDS.get(family, SIZES), **head})
        settings["calibration"] = write_calibration(model, tmp_path / "t.safetensors", samples=8)
    else:
        model = write_family(tmp_path / "m", family, **DENSE_SIZES, **head)
    run(model, tmp_path / "out", **settings)
    return tmp_path / "out", random_tokens(model, 2, LENGTH, seed=5).tolist()


def real_prompts(folder: Path) -> list[list[int]]:
    """Three short texts and a long one."""
    tokenizer = load_tokenizer(folder)
    long = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    return [tokenizer.encode(text)[:400] for text in (*TEXTS, long)]


def verdict(folder: Path) -> Verdict:
    (found,) = engine_verdicts(read_gptq_folder(open_checkpoint(folder)), ["vllm"])
    return found


def compared(
    vllm: Runner,
    record: Record,
    name: str,
    folder: Path,
    prompts: list[list[int]],
    dtype: str,
    *,
    plain: bool,
    top: int = -1,
) -> Compared:
    """What vLLM answers beside our engine in float32, on record."""
    answer = vllm.ask(folder, prompts, dtype=dtype, plain=plain, top=top)
    found = compare(folder, prompts, answer)
    record.add(name, answer, "vLLM, plain" if plain else "vLLM", dtype, found)
    return found
