from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.integrity import fingerprint
from qwenq.models.safetensors_files import write_shards

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
TENSORS = {
    "model.embed_tokens.weight": torch.arange(80, dtype=torch.bfloat16).reshape(10, 8),
    "model.layers.0.self_attn.q_proj.bias": torch.ones(8, dtype=torch.float16),
    "model.norm.weight": torch.ones(8),
}


V1 = {
    "model_type": "qwen", "hidden_size": 8, "intermediate_size": 31, "num_hidden_layers": 1,
    "num_attention_heads": 2, "kv_channels": 4, "vocab_size": 10,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QWENQ_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_opens_lazily_with_its_dtypes(folder: Path) -> None:
    model = open_checkpoint(folder)
    assert model.config == CONFIG and model.notices == [] and model.tied
    assert set(model.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert model.info(name).dtype == tensor.dtype
        assert torch.equal(model.read(name), tensor)


def test_a_head_of_its_own_is_not_tied(folder: Path) -> None:
    save_file(TENSORS | {"lm_head.weight": torch.ones(10, 8)}, folder / "model.safetensors")
    assert not open_checkpoint(folder).tied


def test_safetensors_win_over_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even looked at")
    assert torch.equal(open_checkpoint(folder).read("model.norm.weight"), torch.ones(8))


def test_unread_weights_are_a_notice(folder: Path) -> None:
    """An adapter; and, beside an index, the file that transformers would take first."""
    save_file({"lora_A": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "._model.safetensors").write_bytes(b"of macOS")
    said = "weights that are not read: adapter_model.safetensors, beside model.safetensors"
    assert open_checkpoint(folder).notices == [said]
    save_file(TENSORS, folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = "weights that are not read: adapter_model.safetensors, model.safetensors, beside part.safetensors"
    assert open_checkpoint(folder).notices == [said]


def test_what_macos_leaves_beside_a_file_is_no_second_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "._weights.safetensors").write_bytes(b"of macOS")
    assert set(open_checkpoint(folder).names()) == set(TENSORS)


def test_an_embedding_model_is_no_damaged_language_model(folder: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in TENSORS.items()}
    save_file(bare, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"called layers\.0…, not model\.layers\.0….*embedding models"):
        open_checkpoint(folder)


def test_pickle_alone_is_read_safely(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    assert torch.equal(open_checkpoint(folder).read("model.norm.weight"), torch.ones(8))


def test_a_folder_of_something_else_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match="not a model folder"):
        open_checkpoint(tmp_path)


def test_a_config_without_weights_is_an_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_checkpoint(folder)


def test_truncated_weights_are_named_on_opening(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptFileError, match="cut off") as caught:
        open_checkpoint(folder)
    assert str(caught.value.where) == str(path)


def test_unsupported_models_are_refused_before_their_weights_are_read(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen4_exp"}))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="hyper-connections"):
        open_checkpoint(folder)


def test_fingerprint_is_the_same_wherever_it_lies(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = open_checkpoint(folder)
    other = tmp_path_factory.mktemp("other")
    entries = [(name, model.info(name)) for name in reversed(list(model.names()))]
    write_shards(other, entries, model.read, max_bytes=64)
    config = CONFIG | {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    (other / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert len(model.fingerprint) == 16 and int(model.fingerprint, 16) >= 0
    assert open_checkpoint(other).fingerprint == model.fingerprint


def changed_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def changed_name(folder: Path) -> None:
    renamed = {name.replace("norm", "form"): tensor for name, tensor in TENSORS.items()}
    save_file(renamed, folder / "model.safetensors")


def changed_shape(folder: Path) -> None:
    save_file(TENSORS | {"model.norm.weight": torch.ones(4, 2)}, folder / "model.safetensors")


def changed_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1e6}))


@pytest.mark.parametrize("change", [changed_bit, changed_name, changed_shape, changed_config])
def test_fingerprint_sees_every_change(folder: Path, change: object) -> None:
    before = open_checkpoint(folder).fingerprint
    assert callable(change)
    change(folder)
    assert open_checkpoint(folder).fingerprint != before


def test_fingerprint_is_cached_and_a_damaged_note_is_not_believed(folder: Path, cache: Path) -> None:
    right = open_checkpoint(folder).fingerprint
    (note,) = (cache / "fingerprints").iterdir()
    note.write_text("0123456789abcdef")
    assert open_checkpoint(folder).fingerprint == "0123456789abcdef"  # the note is what is read
    for garbage in (b"garbage", b"\xff" * 16, b""):
        note.write_bytes(garbage)
        assert open_checkpoint(folder).fingerprint == right


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIG | {"qwen_v1": {"seq_length": 64}}, "not as `qwenq convert` writes it"),
        (V1, "counts w1 and w2 together, but 31 is odd"),
        (V1 | {"quantization_config": {"quant_method": "gptq"}}, "names no GPTQ settings"),
    ],
)
def test_errors_in_config_json_name_the_folder(folder: Path, config: dict[str, object], says: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says) as raised:
        open_checkpoint(folder)
    assert raised.value.where == str(folder / "config.json")


def test_fingerprint_of_a_touched_file_is_taken_anew(folder: Path, cache: Path) -> None:
    right = open_checkpoint(folder).fingerprint
    for note in (cache / "fingerprints").iterdir():
        note.write_text("0123456789abcdef")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert open_checkpoint(folder).fingerprint == right


def test_sources_without_files_are_never_cached(folder: Path, cache: Path) -> None:
    model = open_checkpoint(folder)

    class InMemory:
        names, info, read = model.names, model.info, model.read

    copy = Checkpoint(folder, model.config, InMemory())
    assert copy.fingerprint == fingerprint(model.config, InMemory())
    assert not (cache / "fingerprints").exists()
    assert copy.fingerprint == model.fingerprint
