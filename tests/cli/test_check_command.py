"""``qwenq check`` as a user runs it, on a tiny model that `qwenq quantize`'s own packer wrote."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_shell import Shell
from evals.test_check import write_quantised
from safetensors.torch import load_file, save_file
from tiny_model import TEXT, write_tiny_model

from qwenq.errors import UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.identity import base_facts


@pytest.fixture(autouse=True)
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    Path("notes.txt").write_text(TEXT * 60)
    return Shell("check", monkeypatch, capsys)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def quantised_folder(folder: Path, base: Path, *, noise: float = 0.0) -> Path:
    """A GPTQ folder as third parties write it: no manifest."""
    return write_quantised(folder, base, QuantConfig(bits=8, group_size=16), noise)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantised_folder(tmp_path_factory.mktemp("plain") / "q", base)


@pytest.fixture
def ours(base: Path, plain: Path, tmp_path: Path) -> Path:
    """The same folder with a manifest that names its base."""
    folder = tmp_path / "ours"
    shutil.copytree(plain, folder)
    write_manifest(folder, base={"model": str(base), "fingerprint": open_checkpoint(base).fingerprint})
    return folder


def write_manifest(folder: Path, **facts: Any) -> None:
    files = {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
        for file in folder.iterdir()
        if file.name != "qwenq.json"
    }
    (folder / "qwenq.json").write_text(json.dumps({**facts, "files": files}))


SMALL = ("--text", "notes.txt", "--samples", 3, "--seq-len", 24, "--device", "cpu")


def test_the_manifest_names_the_base(ours: Path, base: Path, check: Shell) -> None:
    ran = check(ours, *SMALL, "--modules", 2)
    assert ran.code == 0, ran.err
    for expected in (
        f"{ours} (Int8, groups of 16)",
        str(base),
        "notes.txt, 3 × 24 tokens; float32 on cpu",
        "95 % interval",
        "worst 2 of 14 modules",
        "round-to-nearest",
        "verdict     none: KL 0.00",
        "69 tokens are too few to judge by, 250 the least",
    ):
        assert expected in ran.out
    assert "…" not in ran.out
    # The tiny heads are too narrow for compiled attention; nothing else is to be noted.
    assert all(line.startswith("note: attention, norms") for line in ran.err.splitlines() if "note:" in line)
    assert ran.out.count("model.layers.") == 2


def test_compiled_attention_that_is_missed_is_said(plain: Path, base: Path, check: Shell) -> None:
    """Not in float16: for that none is made."""
    missed = "attention, norms and activations run in torch, which takes longer, because the width"
    for dtype in ("auto", "bfloat16"):
        ran = check(plain, "--against", base, *SMALL, "--dtype", dtype, "--json")
        assert ran.code == 0, ran.err
        assert f"note: {missed}" in ran.err
        assert missed in json.loads(ran.out)["notices"][-1]
    ran = check(plain, "--against", base, *SMALL, "--dtype", "float16")
    assert ran.code == 0, ran.err
    assert "run in torch" not in ran.out + ran.err


def test_settings_in_autogptqs_own_file_alone(plain: Path, base: Path, tmp_path: Path, check: Shell) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "autogptq"))
    (folder / "model.safetensors").rename(folder / "gptq_model-8bit-16g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    ran = check(folder, "--against", base, *SMALL)
    assert ran.code == 1 and "neither config.json nor quantize_config.json says how" in ran.err
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    ran = check(folder, "--against", base, *SMALL)
    assert ran.code == 0, ran.err
    assert "those of quantize_config.json are used" in ran.err and "verdict     none" in ran.out


def test_json_alone_on_stdout(plain: Path, base: Path, check: Shell) -> None:
    ran = check(plain, "--against", base, *SMALL[:2], "--samples", 11, *SMALL[4:], "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["verdict"]["word"] == "good" and found["broken"] is False
    assert 0 < found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"] < 0.01
    assert found["tokens"] == 11 * 23 and found["text"] == "notes.txt" and len(found["modules"]) == 14
    assert "not verified" in found["notices"][0] and "not verified" in ran.err


def test_the_models_own_text_is_the_default_and_is_kept(plain: Path, base: Path, check: Shell) -> None:
    asked = [plain, "--against", base, "--samples", 2, "--json", "--device", "cpu"]
    first = check(*asked)
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert found["text"] == "self" and found["seq_len"] == 256  # the model takes no more
    assert json.loads(check(*asked).out) == found
    assert json.loads(check(*asked, "--seed", 1).out)["kl"] != found["kl"]


def test_text_kept_from_quantising_is_used_again(ours: Path, base: Path, check: Shell) -> None:
    from qwenq.calibration import load_calibration
    from qwenq.models.tokenizer import load_tokenizer

    checkpoint, tokenizer = open_checkpoint(base), load_tokenizer(base)
    made = load_calibration(
        "self", checkpoint=checkpoint, tokenizer=tokenizer, samples=4, held_out=2, seq_len=32
    )
    manifest = json.loads((ours / "qwenq.json").read_text())
    write_manifest(ours, base=manifest["base"], calibration=made.manifest.model_dump(mode="json"))
    kept = set(Path("cache/self-text").iterdir())
    ran = check(ours, "--samples", 2, "--seq-len", 32, "--device", "cpu")
    assert ran.code == 0, ran.err
    assert set(Path("cache/self-text").iterdir()) == kept


def test_the_held_out_part_of_a_saved_set(plain: Path, base: Path, check: Shell) -> None:
    from qwenq.calibration import load_calibration
    from qwenq.models.tokenizer import load_tokenizer

    checkpoint, tokenizer = open_checkpoint(base), load_tokenizer(base)
    made = load_calibration(
        "notes.txt", checkpoint=checkpoint, tokenizer=tokenizer, samples=2, held_out=4, seq_len=24
    )
    made.save(Path("set.safetensors"))
    asked = [plain, "--against", base, "--text", "set.safetensors", "--json"]
    assert json.loads(check(*asked).out)["sequences"] == 4
    assert json.loads(check(*asked, "--samples", 3).out)["sequences"] == 3
    ran = check(*asked, "--samples", 5)
    assert ran.code == 2 and "this set has 4" in ran.err
    ran = check(*asked, "--seq-len", 32)
    assert ran.code == 2 and "this saved set has 24" in ran.err


def test_a_broken_model_is_shown_and_fails(base: Path, tmp_path: Path, check: Shell) -> None:
    ran = check(quantised_folder(tmp_path / "bad", base, noise=3.0), "--against", base, *SMALL)
    assert ran.code == 1
    assert "verdict     broken: KL" in ran.out and "the quantised model is broken" in ran.err


def test_a_text_cut_in_another_way_is_told(ours: Path, base: Path, check: Shell) -> None:
    used = {"source": "notes.txt", "seed": 0, "held_out": 3, "seq_len": 24, "samples": 2}
    manifest = json.loads((ours / "qwenq.json").read_text())
    write_manifest(ours, base=manifest["base"], calibration=used)
    assert "may be seen again" not in check(ours, *SMALL).err
    assert "may be seen again" in check(ours, *SMALL, "--seed", 1).err
    spelt = ["--text", Path("notes.txt").absolute(), *SMALL[2:], "--seed", 1]
    assert "may be seen again" in check(ours, *spelt).err
    Path("other.txt").write_text(TEXT * 50)
    assert "may be seen again" not in check(ours, "--text", "other.txt", *SMALL[2:], "--seed", 1).err


def test_another_base_than_was_quantised(ours: Path, base: Path, tmp_path: Path, check: Shell) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    ran = check(ours, "--against", other, *SMALL)
    assert ran.code == 1 and "this is not the base that was quantised" in ran.err  # broken, as it must be
    write_manifest(ours, base={"model": str(other), "fingerprint": open_checkpoint(base).fingerprint})
    ran = check(ours, *SMALL)
    assert ran.code == 2 and "has changed since it was quantised" in ran.err and "--against" in ran.err


def test_a_base_that_is_gone(ours: Path, check: Shell) -> None:
    for place in ({}, {"folder": None}, {"folder": ""}):
        write_manifest(ours, base={"model": "./gone", "fingerprint": "0" * 16, **place})
        ran = check(ours, *SMALL)
        assert ran.code == 2
        assert "the base that qwenq.json names cannot be opened" in ran.err and "--against BASE" in ran.err


def test_how_to_get_the_base_is_told_beside_how_to_name_it(
    ours: Path, check: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Path:
        raise UsageError("the bundled model is not installed", hint="pip install it")

    monkeypatch.setattr("qwenq.models.bundled.bundled_model", absent)
    write_manifest(ours, base={"model": None, "fingerprint": "0" * 16})
    assert "name it: --against BASE; or pip install it" in check(ours, *SMALL).err


def test_a_base_named_by_a_relative_path_is_found_from_anywhere(
    plain: Path, base: Path, tmp_path: Path, check: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another working folder, with another model at that path there, and after both were moved."""
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    shutil.copytree(plain, disk / "q")
    shutil.copytree(base, disk / "models" / "tiny")  # spelt like a hub id
    opened = open_checkpoint(disk / "models" / "tiny")
    monkeypatch.chdir(disk)
    write_manifest(disk / "q", base=base_facts(opened, "models/tiny", Path("q")))
    write_tiny_model(elsewhere / "models" / "tiny", seed=1)
    monkeypatch.chdir(elsewhere)
    asked = ["--text", tmp_path / "notes.txt", *SMALL[2:]]
    for now in (disk, tmp_path / "moved"):
        if now != disk:
            disk.rename(now)
        ran = check(now / "q", *asked)
        assert ran.code == 0, ran.err
        assert f"base        {now / 'models' / 'tiny'}" in ran.out
    shutil.rmtree(tmp_path / "moved" / "models")
    shutil.rmtree(elsewhere / "models")
    ran = check(tmp_path / "moved" / "q", *asked)
    assert ran.code == 2 and "--against BASE" in ran.err
    assert f"neither models/tiny nor, from this folder, {tmp_path / 'moved' / 'models' / 'tiny'}" in ran.err


def test_a_changed_file_is_named(ours: Path, check: Shell) -> None:
    file = ours / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ran = check(ours, *SMALL)
    assert ran.code == 1 and "not those that were written" in ran.err and "model.safetensors" in ran.err


def test_misuse_ends_with_code_2_and_a_hint(plain: Path, base: Path, tmp_path: Path, check: Shell) -> None:
    wider = write_tiny_model(tmp_path / "wider", intermediate_size=112)
    random = shutil.copytree(base, tmp_path / "random")
    config = json.loads((random / "config.json").read_text()) | {"qwenq_random_weights": {"seed": 0}}
    (random / "config.json").write_text(json.dumps(config))
    drawn = shutil.copytree(plain, tmp_path / "drawn")  # its base lies on no disk
    config = json.loads((drawn / "config.json").read_text()) | {"qwenq_random_weights": {"seed": 0}}
    (drawn / "config.json").write_text(json.dumps(config))
    for arguments, message in (
        ([drawn], "random weights"),
        ([base, "--against", base], "not quantised"),
        ([plain], "which model was this made from?"),
        ([plain, "--against", plain], "itself quantised"),
        ([plain, "--against", wider], "intermediate_size is 48"),
        ([plain, "--against", random], "random weights"),
        ([tmp_path / "none", "--against", base], "no such model folder"),
        ([plain, "--against", base, "--text", "gone.txt"], "no such text: gone.txt"),
        ([plain, "--against", base, "--samples", "0"], "--samples"),
        ([plain, "--against", base, "--device", "quantum"], "--device"),
    ):
        ran = check(*arguments)
        assert ran.code == 2, (arguments, ran.err)
        assert message in ran.err
        assert "Traceback" not in ran.err


def test_a_module_without_its_scales_is_named(plain: Path, base: Path, tmp_path: Path, check: Shell) -> None:
    folder = shutil.copytree(plain, tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors")
    ran = check(folder, "--against", base, *SMALL)
    assert ran.code == 1 and "model.layers.1.mlp.up_proj" in ran.err and "lacks scales" in ran.err
