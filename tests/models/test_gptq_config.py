"""Rules for modules that are quantised otherwise, or not at all: as written, and as engines read them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from qwenq.errors import ModelError
from qwenq.models.gptq_config import QuantConfig, dynamic_rules, module_groups, rule_for

COMMON = {"group_size": 32, "sym": True, "desc_act": False}
KEPT = ["linear_attn.conv1d", "linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.gate"]
KEPT += ["mlp.shared_expert_gate"]
BITS = {
    "self_attn.q_proj": 4,
    "self_attn.k_proj": 4,
    "self_attn.v_proj": 4,
    "linear_attn.in_proj_qkv": 8,
    "linear_attn.in_proj_z": 8,
    "linear_attn.out_proj": 8,
    "mlp.gate_proj": 4,
    "mlp.experts.0.gate_proj": 4,
    "mlp.experts.0.down_proj": 4,
    "mlp.shared_expert.gate_proj": 4,
}
RULES = dynamic_rules(KEPT, BITS, 4, COMMON, ["mtp", "visual"])


def settings_of(module: str) -> int:
    """Bits of a module as vLLM, SGLang and GPTQModel find them; 16: it is not quantised."""
    for pattern, settings in RULES.items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
            return 16 if pattern.startswith("-:") else int(settings["bits"])
    return 4


@pytest.mark.parametrize(
    "prefix", ["model.layers.3.", "model.language_model.layers.3.", "language_model.model.layers.3."]
)
@pytest.mark.parametrize(
    ("module", "bits"),
    [
        *BITS.items(),
        *((name, 16) for name in KEPT),
        ("self_attn.qkv_proj", 4),
        ("linear_attn.in_proj_qkvz", 8),
        ("linear_attn.in_proj_ba", 16),
        ("mlp.gate_up_proj", 4),
        ("mlp.experts", 4),
        ("mlp.shared_expert.gate_up_proj", 4),
    ],
)
def test_every_module_is_found_under_the_names_of_files_and_engines(
    prefix: str, module: str, bits: int
) -> None:
    assert settings_of(prefix + module) == bits


@pytest.mark.parametrize(
    "module",
    [
        "mtp.layers.0.self_attn.qkv_proj",
        "mtp.fc",
        "model.visual.blocks.0.attn.qkv",
        "visual.merger.linear_fc1",
    ],
)
def test_what_lies_beside_the_language_model_is_not_quantised(module: str) -> None:
    assert settings_of(module) == 16


def test_experts_can_be_left_alone() -> None:
    rules = dynamic_rules(["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj"], {}, 4, COMMON, [])
    for name in ("mlp.experts", "mlp.experts.17.down_proj"):
        found = rule_for(rules, f"model.layers.0.{name}")
        assert found is not None and found[0].startswith("-:")


def test_settings_of_a_module_are_those_of_the_first_rule_that_matches() -> None:
    rules = {"-:.*gate$": {}, "+:.*down.*": {"bits": 8, "group_size": 64}, ".*": {}, "lm_head": {"bits": 2}}
    quant = QuantConfig.read({"bits": 4, "dynamic": rules})
    own = quant.of("model.layers.0.mlp.down_proj")
    assert (own.bits, own.group_size, own.sym) == (8, 64, True)
    assert quant.of("model.layers.0.mlp.up_proj").bits == 4
    with pytest.raises(ModelError, match="says that this module is not quantised, but it is"):
        quant.of("model.layers.0.mlp.gate")


def test_rules_of_nested_files_hold_for_the_language_model() -> None:
    quant = QuantConfig.read({"bits": 4, "dynamic": {r"model\.language_model\.layers\.0\..*": {"bits": 8}}})
    assert quant.of("model.layers.0.mlp.up_proj").bits == 8
    assert quant.of("model.layers.1.mlp.up_proj").bits == 4


def test_rules_survive_being_written_and_read() -> None:
    quant = QuantConfig(dynamic=RULES, modules=(("mlp.gate_proj", "mlp.up_proj"), ("mlp.experts",)))
    assert QuantConfig.read({"quantization_config": quant.to_config_json()}) == quant


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        ([1], "has to be an object of rules"),
        ({"(": {}}, "is not a pattern"),
        ({"x": 3}, "no object"),
        ({"x": {"bits": 5}}, "bits is 5"),
        ({"x": {"group_size": 0}}, "group_size is 0"),
        ({"x": {"sym": "yes"}}, "sym is 'yes'"),
        ({"x" * 2000: {}}, "too long"),
    ],
)
def test_rules_that_make_no_sense_are_refused(dynamic: Any, said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)):
        QuantConfig.read({"bits": 4, "dynamic": dynamic})


def test_modules_are_named_once_and_experts_together() -> None:
    names = ["mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj"]
    assert module_groups([["self_attn.q_proj"], *([name] for name in names)]) == [
        ["self_attn.q_proj"],
        ["mlp.experts"],
    ]
