from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.config import KNOWN_ARCHITECTURES, read_config
from qwenq.models.unsupported import NOT_SUPPORTED_YET

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "_name_or_path": "somewhere",
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return folder


def test_a_sound_config_is_read_without_notices(tmp_path: Path) -> None:
    assert read_config(write(tmp_path)) == (LLAMA, [])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"model_type": 3}', '{"x": NaN}', "[" * 100_000, "\xff"]
)
def test_what_is_no_config_makes_no_model_folder(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ModelError, match="not a model folder") as caught:
        read_config(tmp_path)
    assert "holiday.jpg" in str(caught.value.hint)


def test_the_error_for_a_missing_config_lists_the_folder(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.txt").touch()
    with pytest.raises(ModelError, match=r"config.json is missing") as caught:
        read_config(tmp_path)
    assert "00.txt" in str(caught.value.hint) and "and 4 more" in str(caught.value.hint)


def test_a_file_and_a_missing_folder_have_different_errors(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="not a model folder") as caught:
        read_config(tmp_path / "model.gguf")
    assert "it is a file" in str(caught.value)
    with pytest.raises(ModelError, match="not a model folder") as caught:
        read_config(tmp_path / "missing")
    assert "does not exist" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_attn_implementation_internal": "owner/kernel"}, "_attn_implementation_internal"),
        ({"_experts_implementation_internal": "owner/kernel"}, "_experts_implementation_internal"),
        ({"text_config": {"_attn_implementation": "x"}}, "text_config._attn_implementation"),
        ({"parts": [{"inner": {"_x": 1}}]}, "parts.inner._x"),
    ],
)
def test_private_keys_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named.replace(".", r"\.")) as caught:
        read_config(write(tmp_path, **changes))
    assert "private" in caught.value.what


@pytest.mark.parametrize("flag", [True, False])
def test_flags_that_transformers_itself_has_saved_are_read(tmp_path: Path, flag: bool) -> None:
    """A folder of bitsandbytes is told as what it is: quantised. As anything but a flag they are refused."""
    bitsandbytes = {"quant_method": "bitsandbytes", "_load_in_4bit": flag, "_load_in_8bit": not flag}
    changes = {"_attn_implementation_autoset": flag, "quantization_config": bitsandbytes}
    assert read_config(write(tmp_path, **changes)) == (LLAMA | changes, [])
    with pytest.raises(ModelError, match="private key _attn_implementation_autoset"):
        read_config(write(tmp_path, _attn_implementation_autoset="owner/kernel"))


@pytest.mark.parametrize(
    "name",
    ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel", "LlamaModel"],
)
def test_models_that_are_no_language_models_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is not a causal language model") as caught:
        read_config(write(tmp_path, architectures=[name]))
    assert "LlamaForCausalLM" in str(caught.value.hint)


@pytest.mark.parametrize("names", [[], None, ["LlamaForCausalLM"], ["QWenLMHeadModel"], ["X"], [None], "x"])
def test_other_names_of_architectures_are_no_reason(tmp_path: Path, names: Any) -> None:
    assert read_config(write(tmp_path, architectures=names))[1] == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_remote_code_is_ignored_aloud_where_not_needed(tmp_path: Path, model_type: str) -> None:
    folder = write(tmp_path, model_type=model_type, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    _, notices = read_config(folder)
    assert len(notices) == 1 and "auto_map" in notices[0] and "not run" in notices[0]


def test_remote_code_is_refused_where_only_it_could_load_the_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="remote code, which is never run"):
        read_config(write(tmp_path, model_type="mystery", auto_map={"AutoModel": "modeling.Evil"}))


def test_unknown_architectures_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_config(write(tmp_path, model_type="nobodys"))
    assert all(name in str(caught.value.hint) for name in KNOWN_ARCHITECTURES)


@pytest.mark.parametrize("model_type", list(NOT_SUPPORTED_YET))
def test_relatives_say_what_is_missing(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(UnsupportedError, match="not supported yet") as caught:
        read_config(write(tmp_path, model_type=model_type))
    assert NOT_SUPPORTED_YET[model_type] in caught.value.what
    assert "qwen3" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear-attention layers"),
        (
            {
                "text_config": {"layer_types": ["linear_attention"], "num_experts": 4},
                "vision_config": {"x": 1},
            },
            "linear-attention layers and the vision tower",
        ),
    ],
)
def test_a_newer_family_is_recognised_by_its_keys(
    tmp_path: Path, changes: dict[str, Any], missing: str
) -> None:
    with pytest.raises(UnsupportedError, match="qwen9 is not supported yet") as caught:
        read_config(write(tmp_path, model_type="qwen9", **changes))
    assert f"{missing}, at least, would have to be added" in caught.value.what


@pytest.mark.parametrize("changes", [{"num_experts": 128}, {"num_experts": None}, {"layer_types": "odd"}])
def test_a_stranger_is_just_unknown(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="'qwen9' is unknown here"):
        read_config(write(tmp_path, model_type="qwen9", **changes))


def test_first_qwen_folders_without_a_model_type_are_known_by_their_class(tmp_path: Path) -> None:
    config = {"architectures": ["QWenLMHeadModel"], "n_embd": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path)[0]["model_type"] == "qwen"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", 10**12),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", 66),  # does not divide into 4 heads
        ("num_hidden_layers", True),
        ("num_hidden_layers", 10**6),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", [16]),
        ("vocab_size", 1 << 40),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", -1.0),
        ("tie_word_embeddings", "yes"),
        ("quantization_config", "gptq"),
        ("max_position_embeddings", 1 << 31),
    ],
)
def test_absurd_values_are_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(write(tmp_path, **{key: value}))
    assert key in caught.value.what and repr(value) in caught.value.what


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_missing_counts_are_named(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in LLAMA.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"has no {key}"):
        read_config(tmp_path)


def test_a_head_size_of_its_own_frees_the_width(tmp_path: Path) -> None:
    assert (
        read_config(write(tmp_path, hidden_size=66, head_dim=16))[0]["hidden_size"] == 66
    )  # as in Qwen3-0.6B


def test_two_spellings_of_positions_that_differ_are_refused(tmp_path: Path) -> None:
    """As of a folder that transformers 5 has saved, whose card says to add rope_scaling."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    plain = {"rope_type": "default", "rope_theta": 1e6}
    with pytest.raises(ModelError, match="say different things") as caught:
        read_config(write(tmp_path, model_type="qwen2", rope_scaling=yarn, rope_parameters=plain))
    assert str(caught.value.where) == str(tmp_path / "config.json")
    alike = {**yarn, "rope_theta": 1e6}
    read_config(write(tmp_path, model_type="qwen2", rope_scaling=alike, rope_parameters=alike))
