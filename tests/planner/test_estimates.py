"""The table of GPUs."""

from __future__ import annotations

import pytest

from qwenq.errors import UsageError
from qwenq.planner.estimates import gpu, gpu_names


def test_the_named_gpus_are_there_and_every_figure_has_a_source() -> None:
    assert {"h200", "a100-80g", "rtx-4090"} <= set(gpu_names())
    for name in gpu_names():
        found = gpu(name)
        assert found.source and found.title
        assert 8 <= found.memory_gib <= 300
        assert 200 <= found.bandwidth_gb_s <= 10_000
    assert (gpu("H200").bandwidth_gb_s, gpu("a100-80g").bandwidth_gb_s) == (4800, 2039)


def test_a_misspelt_gpu_is_suggested() -> None:
    with pytest.raises(UsageError) as error:
        gpu("rtx4090")
    assert "did you mean rtx-4090" in str(error.value)
    assert "a100-80g" in str(error.value)


def test_a_shortened_gpu_is_completed() -> None:
    with pytest.raises(UsageError, match="not known") as error:
        gpu("a100")
    assert "did you mean a100-80g or a100-40g?" in str(error.value)
