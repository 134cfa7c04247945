"""Models and requests that contradict themselves: one error each, before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, run
from tiny_families import write_calibration
from tiny_published import rewrite, write_published

from qwenq.errors import CalibrationError, ModelError, QwenqError, UnsupportedError, UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.quantization import quantize
from qwenq.recipe import Recipe
from qwenq.runtime.engine import load


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


MIXTRAL = "model.layers.1.block_sparse_moe"
GLM = "model.layers.1.mlp"


@pytest.mark.parametrize(
    ("family", "name", "change", "said"),
    [
        (
            "mixtral",
            f"{MIXTRAL}.experts.2.w3.weight",
            lambda _: None,
            r"the tensor model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight is missing",
        ),
        (
            "mixtral",
            f"{MIXTRAL}.experts.2.w1.weight",
            lambda tensor: tensor[:-8],
            r"experts\.2\.gate_proj\.weight has shape \(24, 64\), config\.json asks for \(32, 64\)",
        ),
        (
            "mixtral",
            f"{MIXTRAL}.gate.weight",
            lambda tensor: torch.cat([tensor, tensor]),
            r"gate\.weight has shape \(8, 64\), config\.json asks for \(4, 64\)",
        ),
        (
            "glm4_moe",
            f"{GLM}.gate.e_score_correction_bias",
            lambda tensor: torch.cat([tensor, tensor]),
            r"e_score_correction_bias has shape \(8,\), config\.json asks for \(4,\)",
        ),
        (
            "glm4_moe",
            f"{GLM}.gate.e_score_correction_bias",
            lambda _: None,
            "e_score_correction_bias is missing",
        ),
    ],
)
def test_experts_and_routers_that_do_not_fit(
    tmp_path: Path, family: str, name: str, change: Any, said: str
) -> None:
    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        value = change(tensors[name])
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        return rest if value is None else rest | {name: value}

    model = rewrite(write_published(tmp_path / "m", family), changed)
    with pytest.raises(ModelError, match=said):
        run(model, tmp_path / "out", calibration=write_calibration(model, tmp_path / "t.safetensors"))
    with pytest.raises(ModelError, match=said):
        load(model, device="cpu", dtype="float32", engine="transformers")


@pytest.mark.parametrize(
    ("family", "changes", "error", "said"),
    [
        ("gemma3_text", {"layer_types": ["full_attention"]}, ModelError, "layer_types name 1 layers"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention", "chunked_attention"]},
            UnsupportedError,
            "names chunked_attention, which is not known here",
        ),
        ("gemma3_text", {"_sliding_window_pattern": "run_me"}, ModelError, "the private key"),
        ("mixtral", {"num_experts_per_tok": 9}, ModelError, "num_experts_per_tok = 9"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, ModelError, "num_experts_per_tok = 9"),
        ("qwen3_next", {"linear_num_key_heads": 4, "linear_num_value_heads": 6}, ModelError, "a multiple of"),
        ("deepseek_v3", {"n_routed_experts": 0}, ModelError, "n_routed_experts = 0"),
        ("mixtral", {"num_hidden_layers": 3}, ModelError, "the last one has no weights"),
        ("mistral", {"vision_config": {"depth": 1}}, UnsupportedError, "the vision tower"),
    ],
)
def test_configs_that_contradict_themselves(
    tmp_path: Path, family: str, changes: dict[str, Any], error: type[QwenqError], said: str
) -> None:
    with pytest.raises(error, match=said):
        open_checkpoint(edited(write_published(tmp_path / "m", family), **changes))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"-:.*mlp.*": {}}, r"the rule '-:\.\*mlp\.\*' of dynamic says that this module is not quantised"),
        ({"+:.*down_proj": {"bits": 8}}, "scales is .* but bits 8 and group_size 32 make it"),
        ({"+:.*down_proj": {"group_size": 16}}, "scales is .* but bits 4 and group_size 16 make it"),
    ],
)
def test_rules_that_contradict_the_tensors(tmp_path: Path, rules: dict[str, Any], said: str) -> None:
    model = write_published(tmp_path / "m", "glm4_moe")
    run(model, tmp_path / "out", calibration=write_calibration(model, tmp_path / "t.safetensors"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    edited(tmp_path / "out", quantization_config=config | {"dynamic": rules})
    with pytest.raises(ModelError, match=said) as caught:
        load(tmp_path / "out", device="cpu", dtype="float32", engine="transformers")
    assert "down_proj" in str(caught.value.where)


IMAGE = {"type": "image_url", "image_url": {"url": "cat.png"}}
SEEN = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}]}


@pytest.mark.parametrize(
    ("name", "content"),
    [("cat.png", b"\x89PNG\r\n\x1a\n" + bytes(64)), ("chats.jsonl", json.dumps(SEEN).encode() + b"\n")],
)
def test_images_are_refused_as_calibration_for_text_suffices(
    tmp_path: Path, name: str, content: bytes
) -> None:
    model = write_published(tmp_path / "m", "qwen3_vl")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match="image") as caught:
        run(model, tmp_path / "out", calibration=tmp_path / name)
    assert "text suffices: only the language model is quantised" in str(caught.value.hint)


def test_a_model_larger_than_memory_does_not_write_its_own_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a weight of a block is read; with a text it is quantised in as little memory."""
    model = write_published(tmp_path / "m", "mixtral")
    monkeypatch.setattr("qwenq.calibration.self_text.free_memory", lambda: 100_000)
    monkeypatch.setattr(
        "qwenq.calibration.self_text.load_whole_model", lambda *_: pytest.fail("the model was loaded")
    )
    recipe = Recipe().override({"model": str(model)}, quantize={"dtype": "float32"})
    with pytest.raises(UsageError, match="of memory to write its own text") as caught:
        quantize(recipe, tmp_path / "out", Recorder(), device="cpu")
    assert "--calibration FILE" in str(caught.value.hint)
    tokens = write_calibration(model, tmp_path / "t.safetensors")
    assert run(model, tmp_path / "out", calibration=tokens).check is not None


def test_values_that_transformers_would_change_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that transposes is refused where it applies: names alone are translated."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    turned = WeightConverter(
        source_patterns="mlp.up_proj.weight",
        target_patterns="mlp.up_proj.weight",
        operations=[Transpose(0, 1)],
    )
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda _: [turned])
    model = write_published(tmp_path / "m", "mistral")
    with pytest.raises(
        UnsupportedError, match=r"changes the values of model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        open_checkpoint(model)
