"""What lies beside models, or looks like one: named for what it is, with what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from qwenq.errors import ModelError, UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import pack
from qwenq.models.opening import resolve_model

ADAPTER = {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "peft_type": "LORA"}

FOLDERS = [
    ({"adapter_config.json": json.dumps(ADAPTER)}, "adapter of Qwen/Qwen2.5-0.5B-Instruct", "merge"),
    ({"checkpoint-9/config.json": "{}", "checkpoint-10/config.json": "{}"}, "trainer's output", "point-10"),
    ({"checkpoint-9/adapter_config.json": "{}"}, "of LoRA adapters", "merge"),
    ({"zero_to_fp32.py": "", "global_step9/x.pt": ""}, "DeepSpeed", "zero_to_fp32"),
    ({"__0_0.distcp": ""}, "FSDP", "merge-weights"),
    ({"models--Qwen--Qwen3-8B/refs/main": ""}, "hub's cache, with Qwen/Qwen3-8B", "hub id"),
    ({"hub/models--Qwen--Qwen3-8B/refs/main": ""}, "hub's cache, with Qwen/Qwen3-8B", "hub id"),
    ({"snapshots/abc/config.json": "{}"}, "in the hub's cache", "snapshots/abc"),
    ({"q4_k_m.gguf": ""}, "GGUF", "safetensors"),
    ({"params.json": "{}", "consolidated.00.pth": ""}, "original layout", "transformers"),
    ({"model_index.json": "{}"}, "diffusion", "causal"),
    ({"dataset_info.json": "{}", "state.json": "{}"}, "a data set", "--calibration"),
    ({"final/config.json": "{}"}, "in a folder below", "final"),
]


@pytest.mark.parametrize(("files", "what", "hint"), FOLDERS, ids=[what for _, what, _ in FOLDERS])
def test_a_folder_that_is_no_model(tmp_path: Path, files: dict[str, str], what: str, hint: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path)
    assert what in caught.value.what and hint in str(caught.value.hint)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").touch()
    with pytest.raises(UsageError, match="GGUF"):
        resolve_model(str(tmp_path / "q4.gguf"))


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [
        ("base_model.model.", "merge"),
        ("_orig_mod.", "_orig_mod.save_pretrained"),
        ("module.", "module.save_pretrained"),
        ("student.", "begin with model."),
    ],
)
def test_names_with_something_before_them(tmp_path: Path, prefix: str, hint: str) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=f"the prefix '{prefix}'") as caught:
        open_checkpoint(tmp_path)
    assert hint in str(caught.value.hint)


def test_an_adapter_with_the_config_of_its_base(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(8, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="LoRA adapter's"):
        open_checkpoint(tmp_path)


def test_a_head_unlike_the_embedding_is_used_with_a_notice(tmp_path: Path) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    same = open_checkpoint(tmp_path)
    assert same.notices == [] and same.config["tie_word_embeddings"] is True
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    other = open_checkpoint(tmp_path)
    assert other.config["tie_word_embeddings"] is False and not other.tied
    assert "lm_head.weight is not the embedding" in other.notices[0]


def test_a_quantised_head_is_no_tied_one_whatever_config_json_says(tmp_path: Path) -> None:
    file = write_tiny_model(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    rows, columns = tensors["model.embed_tokens.weight"].shape
    integers = torch.zeros(rows // 8 * 8, columns, dtype=torch.uint8)
    middle = torch.full((len(integers), 1), 8, dtype=torch.uint8)
    packed = pack(integers, torch.ones(len(integers), 1), middle, 4)
    save_file(tensors | packed.tensors("lm_head"), file)
    quant = QuantConfig(bits=4, group_size=columns, lm_head=True).to_config_json()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quant}))
    found = open_checkpoint(tmp_path)
    assert found.config["tie_word_embeddings"] is False and not found.tied
    assert "lm_head.qweight is not the embedding" in found.notices[0]


def with_layers(folder: Path, count: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention"] * count}))


def test_layer_types_of_another_number_of_layers_are_config_jsons_fault(tmp_path: Path) -> None:
    with_layers(write_tiny_model(tmp_path), 3)
    with pytest.raises(ModelError, match="num_hidden_layers = 2, but its layer_types name 3") as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value.where).endswith("config.json")


def test_what_transformers_refuses_in_config_json_is_not_the_tokenizers_fault(tmp_path: Path) -> None:
    from qwenq.models.tokenizer import load_tokenizer

    with_layers(write_tiny_model(tmp_path), 3)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    with pytest.raises(ModelError, match=r"cannot read config\.json") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value.where).endswith("config.json")
