"""Sizes that a quantised model shall have, in all their forms."""

from __future__ import annotations

import pytest

from qwenq.errors import UsageError
from qwenq.models.catalogue import entry
from qwenq.planner.budget import Sizes, allowed_bytes

SIZES = Sizes(elements=1_000_000, least=525_000, most=1_025_000, fixed=300_000)


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        (4.5, 562_500),
        ("4.5", 562_500),
        ("1MB", 700_000),
        ("1.2 MB", 900_000),
        ("1MiB", 2**20 - 300_000),
        (4.2, 525_000),  # the least that works
    ],
)
def test_a_size_is_what_it_says(budget: str | float, allowed: int) -> None:
    assert allowed_bytes(budget, SIZES, None) == allowed


@pytest.mark.parametrize("budget", [3, 4.19, "0.8MB", "0MB"])
def test_what_four_bits_exceed_is_refused_with_the_smallest_that_works(budget: str | float) -> None:
    with pytest.raises(UsageError, match=r"too small.*4\.20 bits, 0\.8 MB") as caught:
        allowed_bytes(budget, SIZES, None)
    assert caught.value.hint == "the smallest that works is 4.2 bits, or 1MB"
    assert allowed_bytes(4.2, SIZES, None) and allowed_bytes("1MB", SIZES, None)


@pytest.mark.parametrize("budget", [8.5, 16, "5GB"])
def test_more_than_eight_bits_take_is_refused(budget: str | float) -> None:
    with pytest.raises(UsageError, match="more than 8 bits") as caught:
        allowed_bytes(budget, SIZES, None)
    assert caught.value.hint == "--bits 8 is all that you need"


def test_a_gpu_has_to_hold_the_cache_too() -> None:
    shape = entry("qwen3-14b").shape
    sizes = Sizes(elements=26_000_000_000, least=13 * 10**9, most=26 * 10**9, fixed=3 * 10**9)
    short, long = (allowed_bytes(f"rtx-4090:{tokens}", sizes, shape) for tokens in (2048, 16384))
    assert short - long > shape.kv_bytes_per_token("float16") * (16384 - 2048)
    assert sizes.least < long < short < 24 * 2**30 - sizes.fixed
    assert allowed_bytes("h200:2048", sizes, shape) == sizes.most  # all of it fits in 8 bits
    with pytest.raises(UsageError, match="is not known"):
        allowed_bytes("rtx-40:2048", sizes, shape)
    with pytest.raises(UsageError, match="is not known"):
        allowed_bytes("rtx-4090:2048", sizes, None)


@pytest.mark.parametrize("budget", ["lots", "", "4.5 bits", "rtx-4090:", "rtx-4090:0", "-4", "nan", "1TB"])
def test_what_is_no_size_is_refused_with_examples(budget: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        allowed_bytes(budget, SIZES, None)
    assert "450MB" in str(caught.value.hint)
