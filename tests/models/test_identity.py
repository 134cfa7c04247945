from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_families import write_family

from qwenq.errors import CorruptFileError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.identity import base_facts, base_of, family_name, model_name, result_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("identity") / "Tiny-Chat", dtype="bfloat16")


def test_an_unquantised_model_is_its_own_family(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    model = result_model(checkpoint, torch.bfloat16, str(folder))
    assert (model.name, model.family, model.precision) == ("Tiny-Chat", "Tiny-Chat", "bf16")
    assert model.fingerprint == checkpoint.fingerprint
    assert model.nbytes is not None
    assert 0 < (folder / "model.safetensors").stat().st_size - model.nbytes < 20_000  # the header
    wide = result_model(checkpoint, torch.float32, str(folder))
    assert (wide.precision, wide.nbytes) == ("fp32", 2 * model.nbytes)  # as if it were stored like that


@pytest.mark.parametrize(
    ("manifest", "name", "family"),
    [
        ({"base": {"model": "Qwen/Qwen2.5-0.5B", "fingerprint": "x"}}, "out", "Qwen2.5-0.5B"),
        ({"base": {"model": None}}, "out", "SmolLM2-135M-Instruct"),
        ({"base": {"model": ".", "name": "Tiny-Chat", "fingerprint": "x"}}, "out", "Tiny-Chat"),
        (None, "Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"),
        (None, "Qwen-1_8B-Chat-Int8", "Qwen-1_8B-Chat"),
        (None, "mine", "mine"),
    ],
)
def test_a_quantised_model_belongs_to_its_base(
    manifest: dict[str, object] | None, name: str, family: str, folder: Path, tmp_path: Path
) -> None:
    mine = tmp_path / name
    mine.mkdir()
    for file in folder.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    config = json.loads((mine / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 8, "group_size": 32}
    (mine / "config.json").write_text(json.dumps(config))
    if manifest is not None:
        (mine / "qwenq.json").write_text(json.dumps(manifest))
    found = result_model(open_checkpoint(mine), torch.float32, str(mine))
    assert (found.precision, found.group_size, found.family) == ("int8", 32, family)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3-8B-AWQ", "Qwen3-8B-FP8", "Qwen3-8B-FP8-dynamic", "Qwen3-8B-quantized.w4a16", "Qwen3-8B-W8A8",
        "Qwen3-8B-int4-AutoRound", "Qwen3-8B-Int3", "Qwen3-8B-4bit-AWQ", "Qwen3-8B-GPTQ-Int4",
        "Qwen3-8B-autoround",
    ],
)  # fmt: skip
def test_the_names_that_others_give_end_in_how_they_quantised(name: str) -> None:
    assert family_name(name) == "Qwen3-8B"


def test_names() -> None:
    assert model_name("Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B"
    assert model_name(None) == "SmolLM2-135M-Instruct"
    assert model_name(".") == Path.cwd().name


def test_a_manifest_records_the_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's own name and place, whatever was typed where; of a hub id and the bundle no place."""
    checkpoint = open_checkpoint(folder)
    monkeypatch.chdir(folder)
    said = base_facts(checkpoint, ".", folder.parent / "deep" / "q")
    assert said == {
        "model": ".",
        "name": "Tiny-Chat",
        "fingerprint": checkpoint.fingerprint,
        "folder": "../../Tiny-Chat",
    }
    assert base_facts(checkpoint, "Qwen/Qwen2.5-0.5B", folder).keys() == {"model", "name", "fingerprint"}
    assert base_facts(checkpoint, None, folder)["name"] == "SmolLM2-135M-Instruct"


def test_a_snapshot_in_the_hubs_cache_has_its_repositorys_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2.5-0.5B-Instruct" / "snapshots" / "7ae557604adf67be"
    snapshot.mkdir(parents=True)
    assert model_name(str(snapshot)) == "Qwen2.5-0.5B-Instruct"
    own = tmp_path / "snapshots" / "mine"
    own.mkdir(parents=True)
    assert model_name(str(own)) == "mine"


def test_a_broken_manifest_is_an_error(tmp_path: Path) -> None:
    assert base_of(tmp_path) == {}
    for broken in (
        "{",
        "[]",
        '{"base": {"model": 7}}',
        '{"base": {"model": "a\\u0000"}}',
        '{"base": {"fingerprint": []}}',
        '{"base": {"model": "a", "folder": 3}}',
    ):
        (tmp_path / "qwenq.json").write_text(broken)
        with pytest.raises(CorruptFileError):
            base_of(tmp_path)
