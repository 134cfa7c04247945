"""Calibration that fits a memory: defaults shrink, what was asked for stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.models import catalogue
from qwenq.planner.calibration_size import LEAST, USABLE, CalibrationSize, calibration_size
from qwenq.planner.estimates import GIB

SHAPE = catalogue.entry("qwen2.5-7b-instruct").shape


def sized(
    gib: float | None, samples: int | None = None, seq_len: int | None = None, ranks: int = 1
) -> CalibrationSize:
    limit = None if gib is None else int(gib * GIB)
    return calibration_size(
        SHAPE, samples, seq_len, longest=32768, dtype="bfloat16", on_gpu=True, limit=limit, ranks=ranks
    )


@given(
    gib=st.floats(1, 100), samples=st.none() | st.integers(1, 99), seq_len=st.none() | st.integers(2, 9000)
)
def test_what_is_asked_for_is_kept_and_defaults_shrink_no_further_than_they_must(
    gib: float, samples: int | None, seq_len: int | None
) -> None:
    found = sized(gib, samples, seq_len)
    assert found.samples == samples or (samples is None and LEAST[0] <= found.samples <= 128)
    assert found.seq_len == seq_len or (seq_len is None and LEAST[1] <= found.seq_len <= 2048)
    assert (found.usual is None) == ((found.samples, found.seq_len) == (samples or 128, seq_len or 2048))
    if found.usual is not None:
        twice = (found.samples, 2 * found.seq_len) if found.seq_len < 2048 and seq_len is None else None
        larger = sized(None, *(twice or (2 * found.samples, found.seq_len)))
        assert larger.memory.peak > USABLE * gib * GIB


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (sized(None), []),
        (sized(80), []),
        (
            sized(24),
            [
                "calibration: 64 × 2048 tokens instead of 128 × 2048, which take 32.6 GiB by estimate; "
                "here are 24.0 GiB of GPU memory"
            ],
        ),
        (
            sized(24, 128, 2048),
            [
                "memory may not suffice: quantising with 128 × 2048 tokens takes 32.6 GiB by estimate; "
                "here are 24.0 GiB of GPU memory"
            ],
        ),
    ],
)
def test_what_was_chosen_is_said(found: CalibrationSize, said: list[str]) -> None:
    assert list(found.notices("GPU memory")) == said


def test_ranks_share_the_sequences() -> None:
    assert sized(24, ranks=2).tokens == "128 × 2048 tokens"
