"""The memory arithmetic against the peaks that the model cards published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenq.models import catalogue
from qwenq.models.shapes import ModelShape
from qwenq.planner.estimates import (
    GIB,
    activation_bytes,
    generation_memory,
    quantisation_memory,
)
from qwenq.published import published_of

DTYPES = {"FP32": "float32", "BF16": "bfloat16", "Int8": "float16", "Int4": "float16"}


def published_bytes(shape: ModelShape, precision: str) -> int:
    """Of the publisher's own file: groups of 128; Qwen v1 is fused and has zero biases."""
    if precision.startswith("Int"):
        return shape.quantised_bytes(int(precision[3:]), 128, zero_biases=True, fused_qkv=True)
    return shape.bytes(DTYPES[precision])


@pytest.mark.parametrize("model", ["qwen-1.8b-chat", "qwen-7b-chat", "qwen-14b-chat"])
def test_weights_and_twice_the_cache_are_the_published_peaks(model: str) -> None:
    """The cards' cache was held twice at its peak; of 8192 tokens that is within 2 % of what they printed."""
    shape, rows = catalogue.entry(model).shape, published_of(model)
    assert {row.precision for row in rows} >= {"BF16", "Int8", "Int4"}
    for row in rows:
        weights = published_bytes(shape, row.precision)
        memory = generation_memory(shape, weights, dtype=DTYPES[row.precision], context=8192)
        predicted = (memory.weights + 2 * memory.kv_cache) / GIB
        assert predicted == pytest.approx(row.memory_gib[1], rel=0.02), row


@pytest.mark.parametrize(("precision", "published"), [("Int8", 3.48), ("Int4", 2.91)])
def test_loading_explains_the_cards_2048_token_cells(precision: str, published: float) -> None:
    """Weights and one more float16 embedding and head, to the digit that was printed."""
    shape = catalogue.entry("qwen-1.8b-chat").shape
    found = published_bytes(shape, precision) + 2 * 2 * shape.embedding_parameters
    assert round(found / GIB, 2) == published


def test_the_cache_is_held_once_today() -> None:
    """1.8B in BF16, 8192 tokens: about 4.9 GiB and not 6.48."""
    shape = catalogue.entry("qwen-1.8b-chat").shape
    memory = generation_memory(shape, shape.bytes(), dtype="bfloat16", context=8192)
    assert memory.kv_cache == int(1.5 * GIB)
    assert memory.decode_peak / GIB == pytest.approx(4.92, abs=0.01)
    assert memory.decode_peak < memory.peak < memory.weights + 2 * memory.kv_cache


def test_batch_multiplies_the_cache_and_not_the_weights() -> None:
    shape = catalogue.entry("qwen3-8b").shape
    one, eight = (
        generation_memory(shape, shape.bytes(), dtype="bfloat16", context=1000, batch=batch)
        for batch in (1, 8)
    )
    assert eight.kv_cache == 8 * one.kv_cache
    assert eight.weights == one.weights
    assert eight.load == one.load == shape.bytes() + 151936 * 4096 * 2


def test_activations_by_hand() -> None:
    qwen = catalogue.entry("qwen-7b").shape  # MLP wins: 2 × 4096 + 3 × 11008 values a token
    assert activation_bytes(qwen, 10, 2) == 10 * (2 * 4096 + 3 * 11008) * 2
    narrow = replace(qwen, ffn=128)  # attention wins: q, rotated q, output, k, rotated k, v
    assert activation_bytes(narrow, 10, 4) == 10 * (2 * 4096 + 6 * 4096) * 4


def test_quantisation_holds_one_block() -> None:
    shape = catalogue.entry("qwen-7b").shape
    found = quantisation_memory(shape, samples=4, seq_len=256)
    assert found.block == (4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096 + 2 * 4096) * 2
    assert found.file == found.block
    on_gpu = quantisation_memory(shape, samples=4, seq_len=256, on_gpu=True)
    assert (on_gpu.file, found.peak - on_gpu.peak) == (0, found.block)
    # down_proj's: H, what the factorisation holds beside it, and the drift of its 4096 outputs
    assert found.hessians == (4 * 11008 + 4096) * 11008 * 4
    assert found.weights == 2 * 4096 * 11008 * 4
    assert found.block_activations == 2 * 4 * 256 * (4096 + 11008) * 2
    assert found.activations == 2 * 4 * 256 * 4096 * 2
    assert found.peak < 6e9  # of 15.4 GB
    deeper = quantisation_memory(replace(catalogue.entry("qwen-7b").shape, ffn=11008), samples=8, seq_len=256)
    assert deeper.peak - found.peak == found.activations + found.block_activations


@pytest.mark.parametrize(("experts", "samples", "measured"), [(64, 48, 1.643), (160, 24, 2.381)])
def test_quantising_a_mixture_takes_what_was_measured(experts: int, samples: int, measured: float) -> None:
    """Peaks of `qwenq quantize --dtype float32` on the CPU, in GiB, of one layer of these sizes."""
    config: dict[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 300}
    config |= {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 384}
    shape = ModelShape.from_config(config)
    planned = quantisation_memory(shape, samples=samples, seq_len=256, dtype="float32").peak
    assert planned / GIB == pytest.approx(measured, rel=0.1)


def test_quantisation_takes_what_was_measured() -> None:
    """One layer of Qwen-7B's shape with its embeddings: depth costs no memory (tests/test_flat_memory.py)."""
    report = json.loads((Path(__file__).parents[2] / "reports/benchmarks/memory.json").read_text())
    rows = [row for row in report["rows"] if (row["layers"], row["recipe"]) == (1, "default")]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        measured, shape = row["peak_rss_mib"] * 2**20, catalogue.entry("qwen-7b").shape
        planned = quantisation_memory(shape, samples=4, seq_len=256, dtype=row["dtype"]).peak
        assert 0.9 * measured < planned < 1.25 * measured
