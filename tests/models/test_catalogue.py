"""The catalogue against the publishers' own parameter counts, and against transformers' reading of it."""

from __future__ import annotations

import re

import pytest
from transformers import AutoConfig

from qwenq.errors import UsageError
from qwenq.models import catalogue
from qwenq.models.qwen_v1 import V1_KEY
from qwenq.published import published_of

ALL = catalogue.names()


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_the_published_ones(name: str) -> None:
    entry = catalogue.entry(name)
    copy = entry.shape.embedding_parameters if entry.stored_head else 0
    assert entry.shape.parameters + copy == entry.parameters


@pytest.mark.parametrize("name", ALL)
def test_transformers_reads_the_config(name: str) -> None:
    config = catalogue.config_for(name)
    read = AutoConfig.for_model(**config)
    assert read.model_type == config["model_type"]
    elsewhere = {"architectures", "torch_dtype", "full_attention_interval"}
    rotary = {"rope_theta", "partial_rotary_factor"} & config.keys()
    for key in config.keys() - elsewhere - rotary:
        assert getattr(read, key) == config[key], key
    assert {key: read.rope_parameters[key] for key in rotary} == {key: config[key] for key in rotary}
    kinds = getattr(read, "layer_types", None) or ["full_attention"] * read.num_hidden_layers
    shape = catalogue.entry(name).shape
    attending = [layer for block in shape.blocks if block.attends for layer in block.layers]
    assert attending == [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]


@pytest.mark.parametrize("name", [name for name in ALL if re.search(r"qwen3.*-a\d+b|qwen3\.5", name)])
def test_sizes_give_the_totals_in_the_names(name: str) -> None:
    """Also where sizes come from secondary sources: 122B-A10B has 122 billion, of which 10 are active."""
    total, unit, active = re.search(r"(?<=-)(\d+(?:\.\d+)?)([bt])(?:-a(\d+)b)?", name).groups()  # type: ignore[union-attr]
    shape = catalogue.entry(name).shape
    said = float(total) * (1e12 if unit == "t" else 1e9)
    assert shape.parameters == pytest.approx(said, rel=0.07)
    if active and active != "3":  # 3.35, 3.45 and 3.87 billion are all called 3
        assert shape.active_parameters == pytest.approx(float(active) * 1e9, rel=0.03)


def test_sizes_that_no_publishers_file_was_read_for_say_so() -> None:
    marked = {name: catalogue.entry(name).secondary for name in ALL if catalogue.entry(name).secondary}
    assert set(marked) == {"qwen3-coder-480b-a35b-instruct", "qwen3.8-27b", "qwen3.8-2.4t-a95b"}
    assert catalogue.entry("qwen3.8-27b").config == catalogue.entry("qwen3.5-27b").config


def test_every_name_is_there_once() -> None:
    every = [key for name in ALL for key in (*catalogue.entry(name).names, *catalogue.entry(name).hub)]
    assert len(every) == len(set(every))
    wanted = ["qwen-1.8b-chat", "qwen-7b", "qwen-72b", "qwen1.5-32b-chat", "qwen2-7b-instruct"]
    wanted += [f"qwen2.5-{size}-instruct" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")]
    wanted += [f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")]
    wanted += [
        "Qwen/Qwen3-4B-Instruct-2507",
        "qwen3-30b-a3b",
        "qwen3-30b-a3b-thinking-2507",
        "qwen3-235b-a22b",
    ]
    wanted += ["Qwen/Qwen3-Coder-30B-A3B-Instruct", "Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3-coder-next"]
    wanted += [f"qwen3.5-{size}" for size in ("0.8b", "2b", "4b", "9b", "27b", "35b-a3b", "122b-a10b")]
    wanted += [
        "Qwen/Qwen3.5-397B-A17B",
        "qwen3.6-27b",
        "Qwen/Qwen3.6-35B-A3B",
        "qwen3.8-27b",
        "qwen3.8-2.4t-a95b",
    ]
    wanted += [f"qwen2.5-coder-{size}-instruct" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b")]
    wanted += ["Qwen/Qwen2.5-Math-7B-Instruct", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"]
    assert not [name for name in wanted if catalogue.find(name) is None]


def test_hub_ids_and_case_do_not_matter() -> None:
    assert catalogue.entry("Qwen/Qwen-1_8B-Chat") == catalogue.entry("QWEN-1.8B-chat")


def test_qwen_v1_keeps_its_long_context_flags() -> None:
    v1 = catalogue.config_for("qwen-14b-chat")[V1_KEY]
    assert (v1["seq_length"], v1["use_dynamic_ntk"], v1["use_logn_attn"]) == (2048, True, True)
    assert not catalogue.config_for("qwen-72b")[V1_KEY]["use_dynamic_ntk"]
    assert V1_KEY not in catalogue.config_for("qwen1.5-7b")


def test_a_config_is_a_copy() -> None:
    catalogue.config_for("qwen3-8b")["hidden_size"] = 1
    assert catalogue.config_for("qwen3-8b")["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("qwen2.5-7b-instrct", "qwen2.5-7b-instruct"),
        ("qwen-7b-chta", "qwen-7b-chat"),
        ("Qwen3_8B", "qwen3-8b"),
        ("qwen2.5-7b", "qwen2.5-7b-instruct"),
        ("Qwen/Qwen3-Next-80B", "qwen3-next-80b-a3b-instruct"),
        ("qwen3.5-35b", "qwen3.5-35b-a3b"),
        ("qwen3-4b-2507", "qwen3-4b-instruct-2507"),
    ],
)
def test_a_misspelt_or_shortened_name_is_suggested(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as error:
        catalogue.entry(typed)
    assert str(error.value.hint).startswith(f"did you mean {meant}")


def test_the_bundled_model_is_float32_and_its_namesake_on_the_hub_is_not() -> None:
    entry = catalogue.entry(catalogue.BUNDLED)
    assert entry.dtype_of(catalogue.BUNDLED) == entry.config["torch_dtype"] == "float32"
    assert entry.dtype_of(entry.hub[0]) == catalogue.entry("qwen3-8b").dtype_of("Qwen3-8B") == "bfloat16"


def test_each_name_has_its_own_hub_id() -> None:
    entry = catalogue.entry("qwen-1.8b")
    assert (entry.hub_of("QWEN-1.8b"), entry.hub_of("qwen-1.8b-chat")) == (
        "Qwen/Qwen-1_8B",
        "Qwen/Qwen-1_8B-Chat",
    )
    for name in ALL:
        assert catalogue.entry(name).hub_of(name) == catalogue.entry(name).hub[0]


def test_published_rows() -> None:
    rows = {row.precision: row for row in published_of("qwen-1.8b-chat")}
    assert list(rows) == ["FP32", "BF16", "Int8", "Int4"]
    assert rows["Int4"].accuracy == {"mmlu": 42.9, "ceval": 52.8, "gsm8k": 31.2, "humaneval": 25.0}
    assert rows["FP32"].speed["plain"] == [52.28, 44.95]
    assert rows["BF16"].memory_gib == [4.23, 6.48]
    assert "A100" in rows["Int8"].hardware
    assert published_of("qwen3-8b") == []
    assert len(published_of("qwen-7b-chat")) == len(published_of("qwen-14b-chat")) == 3


def test_every_published_row_belongs_to_an_entry() -> None:
    known = [row for name in ALL for row in published_of(name)]
    assert len(known) == 4 + 3 + 3 + 3
    for row in known:
        assert min(row.accuracy.values()) > 0 and max(row.accuracy.values()) < 100
