"""Bad input to ``qwenq quantize``: what happened, where, what to try; exit 2 for misuse, 1 for failure."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from quantize_shell import TEXT, QuantizeShell
from safetensors.torch import load_file, save_file
from tiny_families import random_tokens, save_calibration, write_calibration, write_family

from qwenq.models.checkpoint import open_checkpoint

# Misuse: exit code 2


@pytest.mark.parametrize(("options", "says"), [
    (["--bits", 3], "bits = 3"),
    (["--group-size", 48], "group_size = 48"),
    (["--group-size", 64], "does not divide the 96 input columns of mlp.down_proj"),
    (["--group-size", "big"], "group_size = 'big'"),
    (["--damp", 2], "damp = 2"),
    (["--dtype", "int7"], "dtype = 'int7'"),
    (["--act-order", "yes"], "act_order = 'yes'"),
    (["--samples", 0], "samples = 0"),
    (["--device", "quantum:0"], "quantum"),
    (["--recipe", "none.toml"], "no such recipe"),
    (["--calibration", "none.txt"], "none.txt"),
    (["--seq-len", 5000], "5000"),
])  # fmt: skip
def test_a_wrong_option_is_exit_2(
    quantize: QuantizeShell, tmp_path: Path, options: list[object], says: str
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    ran = quantize.refused("--calibration", "text.txt", "--out", "q", *options)
    assert ran.code == 2
    assert says in ran.err
    assert not Path("q").exists()


def test_a_device_that_is_not_here(quantize: QuantizeShell, calibration: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("has the device that must be absent")
    ran = quantize.refused("--device", "cuda:3", "--calibration", calibration)
    assert ran.code == 2
    assert "--device cpu" in ran.err


def test_an_output_folder_of_someone_else(quantize: QuantizeShell, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "thesis.tex").write_text("the only copy")
    ran = quantize.refused("--calibration", calibration, "--out", "q")
    assert ran.code == 2
    assert "holds something else" in ran.err and "remove" not in ran.err
    assert [file.name for file in (tmp_path / "q").iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file(quantize: QuantizeShell, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "q").write_text("")
    assert quantize.refused("--calibration", calibration, "--out", "q").code == 2


def test_a_finished_checkpoint_is_kept_and_not_quantised_again(
    quantize: QuantizeShell, calibration: Path
) -> None:
    assert quantize("--calibration", calibration, "--out", "q").code == 0
    before = Path("q/model.safetensors").read_bytes()
    ran = quantize.refused("--calibration", calibration, "--out", "q", "--bits", 8)
    assert ran.code == 2
    assert "finished checkpoint" in ran.err
    assert Path("q/model.safetensors").read_bytes() == before
    again = quantize.refused("--calibration", calibration, "--out", "q2", model="q")
    assert again.code == 2
    assert "already quantised" in again.err
    assert "qwenq check" in again.err


def test_other_settings_on_an_unfinished_run(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "q.partial"
    partial.mkdir()
    (partial / "run.json").write_text('{"settings": {"bits": 8}}')
    ran = quantize.refused("--calibration", calibration, "--out", "q")
    assert ran.code == 2
    assert "settings.bits was 8, now 4" in ran.err
    assert quantize("--calibration", calibration, "--out", "q", "--no-resume").code == 0


# The model


def test_not_a_model_folder(quantize: QuantizeShell, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = quantize.refused(model="./empty")
    assert ran.code == 1
    assert "not a model folder" in ran.err


def test_neither_a_folder_nor_a_hub_id(quantize: QuantizeShell) -> None:
    assert quantize.refused(model="./nowhere/to/be found").code == 2


def test_a_second_process_on_one_output_is_refused(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path
) -> None:
    from qwenq.models.quantized_folder import LayerStore

    first = LayerStore(tmp_path / "q.partial", {}, resume=True)
    for option in ("--resume", "--no-resume"):
        ran = quantize.refused("--calibration", calibration, "--out", "q", option)
        assert ran.code == 2
        assert "another qwenq is working" in ran.err
    first.release()


def test_an_architecture_that_is_unknown(quantize: QuantizeShell, damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "perceptron"}))
    ran = quantize.refused(model=damaged)
    assert ran.code == 1
    assert "perceptron" in ran.err
    assert all(known in ran.err for known in ("llama", "qwen2", "qwen3"))


def test_a_missing_shard(quantize: QuantizeShell, damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    ran = quantize.refused(model=damaged)
    assert ran.code == 1
    assert "model-00001-of-00002.safetensors is missing" in ran.err


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.99])
def test_truncated_safetensors(
    quantize: QuantizeShell, calibration: Path, damaged: Path, share: float
) -> None:
    file = damaged / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    ran = quantize.refused("--calibration", calibration, model=damaged)
    assert ran.code == 1
    assert "model.safetensors" in ran.err


@pytest.mark.parametrize("at", [3, 40, 200])
def test_a_flipped_bit_in_the_header(
    quantize: QuantizeShell, calibration: Path, damaged: Path, at: int
) -> None:
    file = damaged / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[at] ^= 0x80
    file.write_bytes(raw)
    assert quantize.refused("--calibration", calibration, model=damaged).code == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_is_named(
    quantize: QuantizeShell, calibration: Path, damaged: Path, bad: float
) -> None:
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][2, 3] = bad
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    ran = quantize.refused("--calibration", calibration, "--out", "q", model=damaged)
    assert ran.code == 1
    assert re.search(r"model\.layers\.1\.self_attn\.v_proj\.weight holds \d NaN and \d infinite", ran.err)
    assert not Path("q").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.mlp.up_proj.weight",
    ],
)
def test_a_flipped_exponent_bit_names_the_tensor(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    """The top bit of a weight's exponent, in the file: below 2 it becomes absurd, from 1 on no number."""
    folder = write_family(tmp_path / "flipped", dtype=dtype)
    flip_bit(folder / "model.safetensors", name, bit=6)
    ran = quantize.refused("--calibration", calibration, "--out", "q", model=folder)
    assert ran.code == 1
    assert re.search(rf"{re.escape(name)} holds (a number of size|\d NaN and \d infinite)", ran.err)
    assert not Path("q").exists()


def test_a_flipped_low_bit_changes_the_models_fingerprint_and_nothing_else(
    quantize: QuantizeShell, calibration: Path, damaged: Path
) -> None:
    """A stranger's file has no hash to hold it against: that a last bit has flipped, nobody can see."""
    before = open_checkpoint(damaged).fingerprint
    flip_bit(damaged / "model.safetensors", "model.layers.2.mlp.up_proj.weight", bit=0, byte=-4)
    assert open_checkpoint(damaged).fingerprint != before
    assert quantize("--calibration", calibration, "--bits", 8, "--out", "q", model=damaged).code == 0


def flip_bit(file: Path, name: str, bit: int, byte: int = -1) -> None:
    """Flip a bit in the first number of a tensor, counted from that number's last byte, its highest."""
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + header])[name]
    width = {"F32": 4, "BF16": 2}[entry["dtype"]]
    raw[8 + header + entry["data_offsets"][0] + width + byte] ^= 1 << bit
    file.write_bytes(raw)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch pwned",))


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    quantize: QuantizeShell, calibration: Path, damaged: Path
) -> None:
    (damaged / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.zeros(4), "x": Evil()}, damaged / "pytorch_model.bin")
    ran = quantize.refused("--calibration", calibration, model=damaged)
    assert ran.code == 1
    assert "pytorch_model.bin" in ran.err
    assert not Path("pwned").exists()


# The calibration


@pytest.mark.parametrize(("name", "content", "says", "code"), [
    ("empty.txt", "", "empty", 1),
    ("blank.txt", "\n\n  \n", "empty", 1),
    ("short.txt", "Too short.", "too little text", 1),
    ("cut.jsonl", '{"text": "one"}\n{"text": "tw', "cut off", 1),
    ("other.jsonl", '{"picture": "one"}\n', "picture", 1),
    ("text.docx", "words", "docx", 2),
])  # fmt: skip
def test_calibration_files_that_do_not_do(
    quantize: QuantizeShell, tmp_path: Path, name: str, content: str, says: str, code: int
) -> None:
    (tmp_path / name).write_text(content)
    ran = quantize.refused("--calibration", name, "--samples", 4, "--seq-len", 32, "--out", "q")
    assert ran.code == code
    assert says in ran.err
    assert name in ran.err
    assert not list(tmp_path.glob("q*"))


@pytest.mark.parametrize(("name", "content", "hint"), [
    ("short.txt", "Too short.", "ask for fewer sequences, those held out included, lower --seq-len, or give"),
    ("other.jsonl", '{"body": "one"}\n', "--column of `qwenq calibrate`, column in a recipe"),
])  # fmt: skip
def test_what_is_to_be_done_about_a_text_can_be_done(
    quantize: QuantizeShell, tmp_path: Path, name: str, content: str, hint: str
) -> None:
    """`quantize` has neither --column nor --held-out."""
    (tmp_path / name).write_text(content)
    assert hint in quantize.refused("--calibration", name, "--samples", 4, "--out", "q").err


def test_tokens_out_of_the_vocabulary(quantize: QuantizeShell, tiny_model: Path, tmp_path: Path) -> None:
    tokens = random_tokens(tiny_model, 4, 16)
    tokens[2, 5] = 4242
    path = save_calibration(tiny_model, tmp_path / "c.safetensors", tokens[:3].clone(), tokens[3:].clone())
    ran = quantize.refused("--calibration", path, "--out", "q")
    assert ran.code == 1
    assert "4242" in ran.err


def test_a_set_of_another_tokenizer(quantize: QuantizeShell, tmp_path: Path) -> None:
    other = write_family(tmp_path / "other", bos=False)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_calibration(other, tmp_path / "c.safetensors")
    ran = quantize.refused("--calibration", path, "--out", "q")
    assert ran.code == 1
    assert "another tokenizer" in ran.err
