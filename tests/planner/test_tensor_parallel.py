"""Which numbers of GPUs can share a model: the group counts of Qwen's own checkpoints."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.models import catalogue
from qwenq.planner.tensor_parallel import kv_share, padding, possible_splits, split

GPUS = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("model", "groups", "possible"),
    [
        ("qwen-1.8b-chat", 43, (1,)),
        ("qwen-7b-chat", 86, (1, 2)),
        ("qwen-14b-chat", 107, (1,)),
        ("qwen-72b-chat", 192, (1, 2, 4, 8)),
        ("qwen1.5-32b-chat", 214, (1, 2)),
        ("qwen2-72b-instruct", 231, (1,)),
        ("qwen2.5-1.5b-instruct", 70, (1, 2)),
        ("qwen2.5-3b-instruct", 86, (1, 2)),
        ("qwen2.5-7b-instruct", 148, (1, 2, 4)),
        ("qwen2.5-14b-instruct", 108, (1, 2, 4)),
        ("qwen2.5-32b-instruct", 216, (1, 2, 4, 8)),
        ("qwen2.5-72b-instruct", 231, (1,)),
        ("qwen3-0.6b", 24, (1, 2, 4, 8)),
        ("qwen3-1.7b", 48, (1, 2, 4, 8)),
        ("qwen3-4b", 76, (1, 2, 4)),
        ("qwen3-8b", 96, (1, 2, 4, 8)),
    ],
)
def test_group_counts_of_public_models(model: str, groups: int, possible: tuple[int, ...]) -> None:
    shape = catalogue.shape_for(model)
    assert shape.ffn // 128 == groups
    assert possible_splits(shape, GPUS, 128) == possible


def test_the_output_projection_has_groups_too() -> None:
    """Qwen2.5-0.5B: 38 groups of the MLP could be halved, the 7 of o_proj can not."""
    shape = catalogue.shape_for("qwen2.5-0.5b-instruct")
    assert split(shape, 2, 128).obstacles == ("7 groups of o_proj",)
    assert split(shape, 2, 64).possible
    assert split(shape, 2, None).possible


def test_obstacles_are_named() -> None:
    found = split(catalogue.shape_for("qwen2.5-7b-instruct"), 8, 128)
    assert not found.possible
    assert found.obstacles == ("28 heads", "28 groups of o_proj", "148 groups of down_proj")
    assert split(catalogue.shape_for("qwen2.5-7b-instruct"), 3, None).obstacles[0] == "28 heads"


def test_few_key_value_heads_are_repeated() -> None:
    shape = catalogue.shape_for("qwen2.5-3b-instruct")  # 16 heads, 2 key/value heads
    assert "key/value heads" not in str(split(shape, 8, None).obstacles)
    assert [kv_share(shape, gpus) for gpus in GPUS] == [1, 0.5, 0.5, 0.5]


def test_padding_of_the_72b() -> None:
    """Qwen's own fix: 29568 → 29696, 231 → 232 groups."""
    shape = catalogue.shape_for("qwen2.5-72b-instruct")
    found = padding(shape, 128, GPUS)
    assert found is not None
    assert (found.ffn, found.to, found.groups_before, found.groups_after) == (29568, 29696, 231, 232)
    assert (found.possible_before, found.possible_after) == ((1,), GPUS)
    assert found.parameters == 80 * 3 * 128 * 8192


def test_padding_of_the_14b() -> None:
    found = padding(catalogue.shape_for("qwen1.5-14b-chat"), 128, GPUS)
    assert found is not None
    assert (found.to, found.groups_after) == (14336, 112)


def test_no_padding_where_it_would_not_help() -> None:
    assert padding(catalogue.shape_for("qwen3-8b"), 128, GPUS) is None  # fits already
    assert padding(catalogue.shape_for("qwen2.5-7b-instruct"), 128, GPUS) is None  # 28 heads stand in the way
    assert padding(catalogue.shape_for("qwen2.5-72b-instruct"), -1, GPUS) is None


@given(name=st.sampled_from(catalogue.names()), gpus=st.lists(st.integers(1, 8), min_size=1, unique=True))
def test_padding_only_ever_adds_possibilities(name: str, gpus: list[int]) -> None:
    shape = catalogue.shape_for(name)
    found = padding(shape, shape.auto_group_size(), tuple(gpus))
    if found is not None:
        assert set(found.possible_before) < set(found.possible_after)
        assert found.ffn < found.to <= 2 * found.ffn
        assert found.parameters == shape.layers * 3 * (found.to - found.ffn) * shape.hidden
