"""Which numbers of GPUs can share a model: the group counts of Qwen's own checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pipeline import run
from tiny_published import write_published

from qwenq.models import catalogue
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.shapes import ModelShape
from qwenq.planner.plan import split
from qwenq.publishing.engines import engine_verdicts, read_gptq_folder

GPUS = (1, 2, 4, 8)


def possible_splits(shape: ModelShape, group_size: int) -> tuple[int, ...]:
    return tuple(count for count in GPUS if split(shape, count, group_size).possible)


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
    shape = catalogue.entry(model).shape
    assert shape.ffn // 128 == groups
    assert possible_splits(shape, 128) == possible


def test_the_output_projection_has_groups_too() -> None:
    """Qwen2.5-0.5B: 38 groups of the MLP could be halved, the 7 of o_proj can not."""
    shape = catalogue.entry("qwen2.5-0.5b-instruct").shape
    assert split(shape, 2, 128).obstacles == ("7 groups of o_proj",)
    assert split(shape, 2, 64).possible
    assert split(shape, 2, None).possible


def test_obstacles_are_named() -> None:
    found = split(catalogue.entry("qwen2.5-7b-instruct").shape, 8, 128)
    assert not found.possible
    assert found.obstacles == ("28 heads", "28 groups of o_proj", "148 groups of down_proj")
    assert split(catalogue.entry("qwen2.5-7b-instruct").shape, 3, None).obstacles[0] == "28 heads"


def test_few_key_value_heads_are_repeated() -> None:
    shape = catalogue.entry("qwen2.5-3b-instruct").shape  # 16 heads, 2 key/value heads
    assert "key/value heads" not in str(split(shape, 8, None).obstacles)


@pytest.mark.parametrize(
    ("model", "group_size", "possible"),
    [
        ("qwen3-30b-a3b", 128, (1, 2)),  # 6 groups of an expert
        ("qwen3-30b-a3b", 32, GPUS),  # 24
        ("qwen3-235b-a22b", 128, (1, 2, 4)),
        ("qwen3-next-80b-a3b-instruct", 128, (1, 2, 4)),
        ("qwen3.5-35b-a3b", 64, GPUS),
        ("qwen3.5-27b", 128, GPUS),
    ],
)
def test_experts_have_groups_of_their_own(model: str, group_size: int, possible: tuple[int, ...]) -> None:
    assert possible_splits(catalogue.entry(model).shape, group_size) == possible


def test_obstacles_of_a_mixture_are_named() -> None:
    shape = catalogue.entry("qwen3.5-35b-a3b").shape
    assert split(shape, 8, 128).obstacles == (
        "4 groups of an expert's down_proj",
        "4 groups of the shared expert's down_proj",
    )
    assert split(shape, 3, None).obstacles[2:] == (
        "16 heads of linear attention",
        "32 heads of linear attention",
        "512 channels of an expert's down_proj",
        "512 channels of the shared expert's down_proj",
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_text", "qwen3_5_moe"])
@pytest.mark.parametrize("group_size", [32, -1])
def test_a_plan_agrees_with_the_engines_rules_for_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, group_size: int
) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    folder = run(write_published(tmp_path / "m", family), tmp_path / "out", group_size=group_size).folder
    read = read_gptq_folder(open_checkpoint(folder))
    shape = ModelShape.from_config(read.config)  # type: ignore[arg-type]
    words = re.compile(r"cannot be split|not a multiple|cannot be shared")
    for verdict in engine_verdicts(read, ["vllm"], GPUS):
        refused = any(words.search(problem.reason) for problem in verdict.problems)
        assert split(shape, verdict.gpus, group_size).possible is not refused, verdict
