"""The memory arithmetic against the peaks that the model cards published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenq.models import catalogue
from qwenq.plan.memory import GIB, activation_bytes, generation_memory, quantisation_memory
from qwenq.plan.published import published_bytes, published_peaks


@pytest.mark.parametrize("model", ["qwen-1.8b-chat", "qwen-7b-chat", "qwen-14b-chat"])
def test_two_copies_reproduce_the_published_peaks(model: str) -> None:
    rows = published_peaks(model)
    assert {row.precision for row in rows} >= {"BF16", "Int8", "Int4"}
    for row in rows:
        assert row.deviation == pytest.approx(row.predicted_gib / row.published_gib - 1)
        assert abs(row.deviation) < 0.02, row


def test_the_peaks_are_read_from_the_cards() -> None:
    found = {row.precision: row.published_gib for row in published_peaks("qwen-1.8b-chat")}
    assert found == {"FP32": 13.06, "BF16": 6.48, "Int8": 5.34, "Int4": 4.80}
    found = {row.precision: row.published_gib for row in published_peaks("Qwen/Qwen-7B-Chat")}
    assert found == {"BF16": 22.53, "Int8": 16.62, "Int4": 13.63}
    assert published_peaks("qwen3-8b") == published_peaks("qwen-72b-chat") == published_peaks("nothing") == []


def test_predictions_of_the_protocol_notes() -> None:
    expected = {"FP32": 12.84, "BF16": 6.42, "Int8": 5.32, "Int4": 4.75}
    for row in published_peaks("qwen-1.8b-chat"):
        assert row.predicted_gib == pytest.approx(expected[row.precision], abs=0.006)


@pytest.mark.parametrize(("precision", "published"), [("Int8", 3.48), ("Int4", 2.91)])
def test_loading_explains_the_cards_2048_token_cells(precision: str, published: float) -> None:
    """Weights and one more float16 embedding and head, to the digit that was printed."""
    shape = catalogue.shape_for("qwen-1.8b-chat")
    memory = generation_memory(shape, published_bytes(shape, precision), dtype="float16", context=2048)
    assert round(memory.two_copies_load / GIB, 2) == published


def test_the_cache_is_held_once_today() -> None:
    """1.8B in BF16, 8192 tokens: about 4.9 GiB and not 6.48."""
    shape = catalogue.shape_for("qwen-1.8b-chat")
    memory = generation_memory(shape, shape.bytes(), dtype="bfloat16", context=8192)
    assert memory.kv_cache == int(1.5 * GIB)
    assert memory.decode_peak / GIB == pytest.approx(4.92, abs=0.01)
    assert memory.decode_peak < memory.peak < memory.two_copies_peak
    assert memory.two_copies_peak == memory.weights + 2 * memory.kv_cache


def test_batch_multiplies_the_cache_and_not_the_weights() -> None:
    shape = catalogue.shape_for("qwen3-8b")
    one, eight = (
        generation_memory(shape, shape.bytes(), dtype="bfloat16", context=1000, batch=batch)
        for batch in (1, 8)
    )
    assert eight.kv_cache == 8 * one.kv_cache
    assert eight.weights == one.weights
    assert eight.load == one.load == shape.bytes() + 151936 * 4096 * 2


def test_activations_by_hand() -> None:
    qwen = catalogue.shape_for("qwen-7b")  # MLP wins: 2 × 4096 + 3 × 11008 values a token
    assert activation_bytes(qwen, 10, 2) == 10 * (2 * 4096 + 3 * 11008) * 2
    narrow = qwen.with_ffn(128)  # attention wins: q, rotated q, output, k, rotated k, v
    assert activation_bytes(narrow, 10, 4) == 10 * (2 * 4096 + 6 * 4096) * 4


def test_quantisation_holds_one_block() -> None:
    shape = catalogue.shape_for("qwen-7b")
    found = quantisation_memory(shape, samples=4, seq_len=256)
    assert found.block == (4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096 + 2 * 4096) * 2
    # down_proj's: H, what the factorisation holds beside it, and the drift of its 4096 outputs
    assert found.hessians == (4 * 11008 + 4096) * 11008 * 4
    assert found.weights == 2 * 4096 * 11008 * 4
    assert found.block_activations == 2 * 4 * 256 * (4096 + 11008) * 2
    assert found.activations == 2 * 4 * 256 * 4096 * 2
    assert found.peak < 6e9  # of 15.4 GB
    deeper = quantisation_memory(catalogue.shape_for("qwen-7b").with_ffn(11008), samples=8, seq_len=256)
    assert deeper.peak - found.peak == found.activations + found.block_activations


def test_quantisation_takes_what_was_measured() -> None:
    """One layer of Qwen-7B's shape with its embeddings: depth costs no memory (tests/test_flat_memory.py)."""
    report = json.loads((Path(__file__).parents[2] / "reports/benchmarks/memory.json").read_text())
    rows = [row for row in report["rows"] if (row["layers"], row["recipe"]) == (1, "default")]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        measured, shape = row["peak_rss_mib"] * 2**20, catalogue.shape_for("qwen-7b")
        planned = quantisation_memory(shape, samples=4, seq_len=256, dtype=row["dtype"]).peak
        assert 0.9 * measured < planned < 1.25 * measured
