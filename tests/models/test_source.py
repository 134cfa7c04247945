"""The language model inside a checkpoint: names, parts of fused experts, configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwenq.errors import ModelError
from qwenq.models.config import text_config, whole_config
from qwenq.models.safetensors_files import SafetensorsSource
from qwenq.models.source import TextView

HIDDEN, WIDTH, EXPERTS = 8, 3, 2
GATE_UP, DOWN = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN), torch.randn(EXPERTS, HIDDEN, WIDTH)
MLP = "model.language_model.layers.0.mlp.experts"


def view_of(folder: Path, tensors: dict[str, torch.Tensor]) -> TextView:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return TextView(SafetensorsSource([file]), HIDDEN, folder)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_matrices_in_either_orientation(tmp_path: Path, transposed: bool) -> None:
    stored = [tensor.mT if transposed else tensor for tensor in (GATE_UP, DOWN)]
    view = view_of(tmp_path, {f"{MLP}.gate_up_proj": stored[0], f"{MLP}.down_proj": stored[1]})
    for expert in range(EXPERTS):
        wanted = {
            "gate_proj": GATE_UP[expert, :WIDTH],
            "up_proj": GATE_UP[expert, WIDTH:],
            "down_proj": DOWN[expert],
        }
        for name, weight in wanted.items():
            full = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            assert view.info(full).shape == tuple(weight.shape)
            assert torch.equal(view.read(full), weight)
    assert len(list(view.names())) == 3 * EXPERTS
    assert len(view.shown(f"{MLP}.gate_up_proj")) == 2 * EXPERTS


def test_towers_and_draft_heads_are_hidden_and_kept(tmp_path: Path) -> None:
    names = [
        "lm_head.weight",
        "model.language_model.norm.weight",
        "model.visual.norm.weight",
        "mtp.fc.weight",
    ]
    view = view_of(tmp_path, {name: torch.ones(2) for name in names})
    assert set(view.names()) == {"lm_head.weight", "model.norm.weight"}
    assert set(view.whole.names()) == set(names)
    assert view.published("model.norm.weight") == "model.language_model.norm.weight"
    assert view.shown("mtp.fc.weight") == []


def test_a_plain_checkpoint_needs_no_view(tmp_path: Path) -> None:
    view = view_of(tmp_path, {"lm_head.weight": torch.ones(2), "model.norm.weight": torch.ones(2)})
    assert view.plain


def test_experts_that_fit_neither_orientation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="do not fit each other at a hidden size of 8"):
        view_of(tmp_path, {f"{MLP}.gate_up_proj": GATE_UP, f"{MLP}.down_proj": DOWN[:, :, :2]})
    with pytest.raises(ModelError, match=r"experts\.down_proj"):
        view_of(tmp_path, {f"{MLP}.gate_up_proj": GATE_UP})


def test_the_language_models_config_and_back() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    nested = {
        "model_type": "qwen3_vl_text",
        "hidden_size": 8,
        "intermediate_size": 4,
        "rope_parameters": rope,
    }
    whole = {
        "model_type": "qwen3_vl",
        "text_config": nested,
        "tie_word_embeddings": True,
        "vision_config": {},
    }
    text = text_config(whole)
    assert text["model_type"] == "qwen3"
    assert text["tie_word_embeddings"] is True
    assert text["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e6}
    assert whole_config(whole, text) == whole
    wider = whole_config(whole, {**text, "intermediate_size": 6})
    assert wider == {**whole, "text_config": {**nested, "intermediate_size": 6}}
