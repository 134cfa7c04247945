"""What engines read of positions in config.json: the same in both, or it is refused."""

from __future__ import annotations

import pytest
import torch
from runtime.small_models import random_ids, reference_logits, small_model
from runtime.test_engine import ENGINES, changed

from qwenq.errors import ModelError
from qwenq.runtime.engine import load

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("told", "says"),
    [
        (
            {"rope_scaling": YARN, "rope_parameters": PLAIN},
            "rope_scaling and rope_parameters .* different things",
        ),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e6}}, "different things"),
        (
            {"rope_parameters": YARN, "partial_rotary_factor": 0.5},
            "0.5 of config.json: heads .* rotated whole",
        ),
        ({"rope_parameters": {**YARN, "attention_factor": [1.0]}}, r"attention_factor \[1.0\]; it has to be"),
    ],
)
def test_contradicting_rope_settings_are_refused(told: dict, says: str, engine: str) -> None:
    """As of a folder that transformers 5 has saved, whose card says to add rope_scaling."""
    _, checkpoint = small_model("qwen2-tied")
    with pytest.raises(ModelError, match=says):
        load(changed(checkpoint, told), device="cpu", dtype="float32", engine=engine)


def test_rope_settings_given_twice_alike_are_accepted() -> None:
    _, checkpoint = small_model("qwen2.5-yarn")
    scaling = {"type": "yarn", **checkpoint.config["rope_parameters"]}
    twice = load(changed(checkpoint, {"rope_scaling": scaling}), device="cpu", dtype="float32")
    once = load(checkpoint, device="cpu", dtype="float32", engine="transformers")
    torch.testing.assert_close(twice.logits([[1, 2, 3]])[0], once.logits([[1, 2, 3]])[0], atol=1e-4, rtol=0)


def test_layer_types_of_another_length_are_refused() -> None:
    short = changed(small_model("qwen2-tied")[1], {"layer_types": ["full_attention"]})
    with pytest.raises(ModelError, match="num_hidden_layers = 2, but its layer_types name 1 layers"):
        load(short, device="cpu")


def test_dynamic_rope_beyond_its_length_does_not_depend_on_longer_prompts_before() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model, checkpoint = small_model("llama", rope_parameters=scaling, max_position_embeddings=32)
    runner = load(checkpoint, device="cpu", dtype="float32", engine="transformers")
    ids = random_ids(90)
    expected = [reference_logits(model, ids[:length]) for length in (32, 40, 90)]
    for logits in reversed(expected):
        found = runner.logits([ids[: len(logits)]])[0]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
