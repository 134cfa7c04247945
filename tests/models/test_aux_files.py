"""What is copied beside the weights, and what never is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenq.errors import ModelError
from qwenq.models.aux_files import write_aux_files
from qwenq.models.random_weights import random_checkpoint


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def test_tokenizer_template_settings_and_licence_travel_but_no_code(folders: tuple[Path, Path]) -> None:
    source, target = folders
    travels = [
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "License-MIT.md",
        "LICENSE-APACHE-2.0",
        "LICENSE-2.0.txt",
        "Apache-2.0.LICENSE",
        "COPYING.rst",
        "merges.txt",
        "NOTICE.txt",
    ]
    stays = [
        "modeling_qwen.py",
        "check_license.py",
        "license.safetensors",
        "README.md",
        "model.safetensors",
        "pytorch_model.bin",
        "qwenq.json",
        "config.json",
    ]
    for name in (*travels, *stays):
        (source / name).write_text(f"contents of {name}")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert write_aux_files(source, target, {"model_type": "qwen2"}) == []
    assert {file.name for file in target.iterdir()} == {*travels, "generation_config.json"}
    assert all((target / name).read_text() == f"contents of {name}" for name in travels)
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}


def test_a_tokenizer_config_is_freed_of_remote_code(folders: tuple[Path, Path]) -> None:
    source, target = folders
    config = {
        "tokenizer_class": "X",
        "auto_map": {"AutoTokenizer": ["evil.X", None]},
        "chat_template": "{{ 你 }}",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text("{}")
    write_aux_files(source, target, {})
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "X", "chat_template": "{{ 你 }}"}


def test_a_missing_tokenizer_is_a_notice(folders: tuple[Path, Path]) -> None:
    assert "no tokenizer" in write_aux_files(*folders, {})[0]


def test_a_model_that_lies_nowhere_takes_nothing_from_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantize qwen-7b --weights random`, run where somebody has a folder called random-weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random-weights").mkdir()
    (tmp_path / "random-weights" / "LICENSE").write_text("another model's")
    (tmp_path / "target").mkdir()
    made = random_checkpoint("qwen-7b-chat", seed=1)
    assert made.folder.is_dir()
    (said,) = write_aux_files(made.companions, tmp_path / "target", made.config)
    assert "no tokenizer is written" in said
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.parametrize("text", ["{", "[]", "\udce4"])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_damaged_json_is_named(folders: tuple[Path, Path], name: str, text: str) -> None:
    source, target = folders
    (source / "tokenizer.json").write_text("{}")
    (source / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=name) as raised:
        write_aux_files(source, target, {})
    assert raised.value.where == str(source / name)
