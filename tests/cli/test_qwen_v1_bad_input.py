"""Damaged Qwen v1 folders through the command line: exit 1, what and where, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_shell import Ran, Shell
from runtime.small_chat import write_chat_folder
from safetensors.torch import load_file, save_file

from qwenq.models.qwen_tokenizer import RANKS_FILE

Command = Callable[..., Ran]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QWENQ_DEBUG", raising=False)
    Path("text.txt").write_text("Quantise the weights, and measure what it cost.\n" * 100)

    def run(name: str, *arguments: object) -> Ran:
        return Shell(name, monkeypatch, capsys)(*arguments)

    return run


def refused(ran: Ran, *said: str) -> None:
    assert ran.code == 1, ran
    assert ran.err.startswith("qwenq: "), ran.err
    assert "\n  where: " in ran.err
    assert "Traceback" not in ran.err + ran.out
    for words in said:
        assert words in ran.err
    assert not Path("q").exists()
    assert not Path("q.partial").exists()


def quantise(command: Command, folder: Path) -> Ran:
    return command("quantize", folder, "--calibration", "text.txt", "--out", "q", "--device", "cpu")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_c_attn_that_is_not_three_times_the_width(command: Command, tmp_path: Path, kind: str) -> None:
    folder = write_chat_folder(tmp_path / "m")
    name = f"transformer.h.1.attn.c_attn.{kind}"
    change_tensor(folder, name, lambda tensor: tensor[:128])
    for ran in (quantise(command, folder), command("convert", folder, "q")):
        refused(ran, "has shape (128,", name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_embd": 128}, ("hidden_size is 64", "n_embd is 128")),
        ({"kv_channels": 32}, ("kv_channels 32", "hidden_size is 64")),
        ({"n_layer": 3}, ("num_hidden_layers is 2", "n_layer is 3")),
        ({"intermediate_size": 191}, ("w1 and w2 together", "191")),
        ({"use_dynamic_ntk": "yes"}, ("use_dynamic_ntk = 'yes'",)),
    ],
)
def test_keys_that_contradict_each_other(
    command: Command, tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]
) -> None:
    folder = write_chat_folder(tmp_path / "m")
    change_config(folder, **changes)
    refused(quantise(command, folder), *said, str(folder / "config.json"))


def test_a_quantised_folder_in_activation_order(command: Command, tmp_path: Path) -> None:
    base, folder = write_chat_folder(tmp_path / "base"), write_chat_folder(tmp_path / "m", bits=4)
    name = "transformer.h.1.attn.c_attn.g_idx"
    change_tensor(folder, name, lambda tensor: tensor.flip(0))
    for ran in (
        command("check", folder, "--against", base, "--text", "text.txt"),
        command("chat", folder),
        command("convert", folder, "q"),
    ):
        refused(ran, "activation order", name)


def cut(raw: bytes) -> bytes:
    return raw[:-100]


def cut_inside_a_line(raw: bytes) -> bytes:
    return raw[:1003]


def doubled_line(raw: bytes) -> bytes:
    return raw + raw.splitlines(keepends=True)[7]


def doubled_rank(raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    return b"".join([*lines[:-1], lines[-1].replace(b" 255", b" 254")])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "none for the single byte"),
        (cut_inside_a_line, "line "),
        (doubled_line, "already has rank 7"),
        (doubled_rank, "rank 254 already occurred on line 255"),
    ],
)
def test_a_damaged_ranks_file(
    command: Command, tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    folder = write_chat_folder(tmp_path / "m")
    ranks = folder / RANKS_FILE
    ranks.write_bytes(damage(ranks.read_bytes()))
    for ran in (
        quantise(command, folder),
        command("chat", folder),
        command("tokenizer", "stats", "text.txt", "--tokenizer", folder),
    ):
        refused(ran, said, str(ranks))


def test_a_ranks_file_with_crlf_is_the_same_tokenizer(command: Command, tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path / "m")
    stats = ("tokenizer", "stats", "text.txt", "--tokenizer", folder, "--json")
    before = command(*stats)
    ranks = folder / RANKS_FILE
    ranks.write_bytes(ranks.read_bytes().replace(b"\n", b"\r\n"))
    after = command(*stats)
    assert (after.code, after.out) == (0, before.out)
