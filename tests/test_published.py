"""What the cards say is found under every name of a model."""

from __future__ import annotations

import pytest

from qwenq.published import published_of, published_rows


@pytest.mark.parametrize("name", ["qwen-1.8b-chat", "Qwen/Qwen-1_8B-Chat", "models/Qwen-1_8B-Chat/"])
def test_a_model_is_found_under_its_names(name: str) -> None:
    rows = published_of(name)
    assert [row.precision for row in rows] == ["FP32", "BF16", "Int8", "Int4"]
    assert rows[0].speed["flash2"] == [52.96, 47.35]
    assert rows[3].memory_gib == [2.91, 4.8]
    assert "A100" in rows[0].hardware


@pytest.mark.parametrize("name", ["qwen-1.8b", "Qwen-7B-Chat-Int4", "", "/"])
def test_another_model_is_not(name: str) -> None:
    assert published_of(name) == []


def test_every_row_says_its_hardware_and_source() -> None:
    assert all(row.hardware and row.source and row.accuracy for row in published_rows())
