"""From a point to its engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwenq.distributed import ALONE
from qwenq.errors import UnsupportedError
from qwenq.profiling.measure import checkpoint_of, engine_for
from qwenq.profiling.spec import Point
from qwenq.runtime import attention


def test_a_row_that_runs_another_attention_says_so(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FP32 rows of v2 do on a GPU."""
    point = replace(points[0], attention="v2")
    checkpoint = checkpoint_of(point)
    with pytest.raises(UnsupportedError, match="attention v2: it is made for NVIDIA GPUs"):
        engine_for(point, checkpoint, ALONE)
    monkeypatch.setattr(attention, "of_row", lambda name, device, dtype: ("off", f"{name} ran off"))
    engine = engine_for(point, checkpoint, ALONE)
    assert "attention off: matmul" in engine.implementation
    assert set(engine.notes) - set(engine_for(points[0], checkpoint, ALONE).notes) == {"v2 ran off"}
