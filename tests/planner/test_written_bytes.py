"""A plan's bytes on disk against folders that `qwenq quantize` wrote: to the byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from pipeline import run
from safetensors.torch import load_file, save_file
from tiny_families import write_family
from tiny_published import FAMILIES, fused, rewrite, with_draft_head, write_published

from qwenq.planner.plan import PlanOptions, find_model, make_plan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def tensor_bytes(folder: Path) -> int:
    """Of all tensors, as the headers of the folder's files have them."""
    total = 0
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        total += sum(end - begin for begin, end in spans)
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": False}),
    ],
)
def test_planned_bytes_are_those_written(
    tmp_path: Path, family: str, shape: dict[str, Any], dtype: str
) -> None:
    model = write_family(tmp_path / "m", family, dtype, num_hidden_layers=1, **shape)
    plan = make_plan(find_model(str(model)), PlanOptions(bits=(4,), group_size=32))
    full, int4 = plan.precisions
    assert full.bytes == tensor_bytes(model)
    assert int4.bytes == tensor_bytes(run(model, tmp_path / "out", group_size=32).folder)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_planned_bytes_of_mixtures_and_hybrids(tmp_path: Path, family: str, bits: int) -> None:
    """With a vision tower and draft layers in the files, which are copied."""
    model = rewrite(write_published(tmp_path / "m", family), with_draft_head)
    planned = make_plan(find_model(str(model)), PlanOptions(bits=(bits,), group_size=32))
    full, quantised = planned.precisions
    assert planned.copied_bytes > 0
    assert full.bytes == tensor_bytes(model)
    assert quantised.bytes == tensor_bytes(run(model, tmp_path / "out", group_size=32, bits=bits).folder)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"])
def test_a_config_alone_tells_the_bytes_of_the_tower(tmp_path: Path, family: str) -> None:
    model = write_published(tmp_path / "m", family)
    expected = tensor_bytes(model)
    (model / "model.safetensors").unlink()
    assert make_plan(find_model(str(model)), PlanOptions(group_size=32)).precisions[0].bytes == expected


@pytest.mark.parametrize("change", [{"depth": None}, {"patch_size": [14, 14]}, "none"])
def test_a_tower_of_unknown_size_is_named(tmp_path: Path, change: Any) -> None:
    model = write_published(tmp_path / "m", "qwen3_vl")
    (model / "model.safetensors").unlink()
    config = json.loads((model / "config.json").read_text())
    tower = change if change == "none" else config["vision_config"] | change
    (model / "config.json").write_text(json.dumps(config | {"vision_config": tower}))
    plan = make_plan(find_model(str(model)), PlanOptions(group_size=32))
    assert (plan.copied_bytes, plan.copied_note) == (0, "the vision tower is copied, too, and not counted")


def test_planned_bytes_of_fused_experts(tmp_path: Path) -> None:
    model = rewrite(write_published(tmp_path / "m", "qwen3_5_moe"), fused)
    full, int4 = make_plan(find_model(str(model)), PlanOptions(bits=(4,), group_size=32)).precisions
    assert full.bytes == tensor_bytes(model)
    assert int4.bytes == tensor_bytes(run(model, tmp_path / "out", group_size=32).folder)


def test_a_tied_head_that_is_stored_is_kept(tmp_path: Path) -> None:
    """As the catalogue says of models such as Qwen3-0.6B: quantising writes the second copy, too."""
    model = write_family(tmp_path / "m", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head.clone()}, model / "model.safetensors", {"format": "pt"})
    plan = make_plan(find_model(str(model)), PlanOptions(bits=(4,)))
    assert plan.copied_bytes == head.nbytes
    assert tensor_bytes(run(model, tmp_path / "out").folder) == plan.precisions[1].bytes
