"""`convert`: v1 to Qwen2, zero points v1 ↔ v2, shards; loaded by stock transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dequantised import logits_of, transformers_model
from listening import notices_to
from models.plain_qwen_v1 import forward, quantise_v1, random_tensors, small_config, write_v1
from pipeline import run
from tiny_families import write_family
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.cli.convert import parse_size
from qwenq.conversion import convert
from qwenq.errors import CorruptFileError, ModelError, QuantisationError, UsageError
from qwenq.events import Advance, Event
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, pack, validate_quantised
from qwenq.runtime.engine import load

IDS = [7, 3, 250, 11, 11, 0, 99, 42, 8, 1, 200, 5]


@pytest.fixture
def v1_folder(tmp_path: Path) -> Path:
    config = small_config(auto_map={"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"})
    folder = write_v1(tmp_path / "v1", config, random_tensors(config))
    (folder / "modeling_qwen.py").write_text("raise SystemExit('remote code ran')")
    (folder / "Tongyi Qianwen LICENSE AGREEMENT.txt").write_text("terms")
    (folder / "NOTICE").write_text("notice")
    return folder


@pytest.fixture
def gptq_v1_folder(tmp_path: Path) -> Path:
    return write_v1(tmp_path / "gptq", *quantise_v1(small_config(), random_tensors(small_config()), 4, 32))


def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a GPTQ folder, dequantised."""
    checkpoint = open_checkpoint(folder)
    quant = QuantConfig.read(checkpoint.config)
    validate_quantised(checkpoint.source, quant)
    plain = DequantisedSource(checkpoint.source, quant)
    return {name: plain.read(name) for name in plain.names()}


def test_a_v1_model_loads_with_stock_transformers(v1_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    said: list[str] = []
    done = convert(v1_folder, tmp_path / "out", listener=notices_to(said))
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0]
    wanted = forward(small_config(), random_tensors(small_config()), IDS)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert sorted(file.name for file in done.folder.iterdir()) == [
        "NOTICE", "Tongyi Qianwen LICENSE AGREEMENT.txt", "config.json", "model.safetensors",
    ]  # fmt: skip
    config = json.loads((done.folder / "config.json").read_text())
    assert "auto_map" not in config
    assert config["qwen_v1"]["seq_length"] == 64
    assert done.changes == ["Qwen v1 layout → Qwen2 layout"]
    assert any("no tokenizer" in notice for notice in said)
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_conversion_left_is_removed_by_the_next(v1_folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from qwenq.conversion import convert\n"
        "end = lambda event: os.kill(os.getpid(), 9) if getattr(event, 'done', 0) else None\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), listener=end)"
    )
    killed = subprocess.run([sys.executable, "-c", code, v1_folder, tmp_path / "out"], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.*.tmp")
    for name in (f".out.{os.getpid()}.tmp", ".out.notes.tmp"):  # of a process that lives; of nobody here
        (tmp_path / name).mkdir()
    convert(v1_folder, tmp_path / "out.copy")
    assert left.exists()
    (tmp_path / f".out.{os.getpid()}.tmp").rename(tmp_path / ".out.1.tmp")  # process 1 always lives
    convert(v1_folder, tmp_path / "out")
    assert not left.exists()
    assert {file.name for file in tmp_path.glob(".*")} == {".out.1.tmp", ".out.notes.tmp"}


def test_the_tokenizer_loads_with_stock_transformers(shared_data: Path, tmp_path: Path) -> None:
    """A v1 folder with the real ranks file: AutoTokenizer and AutoModel on the folder that was written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = small_config(hidden_size=16, num_attention_heads=1, vocab_size=151936, num_hidden_layers=1)
    source = write_v1(tmp_path / "v1", config, random_tensors(config))
    shutil.copyfile(shared_data / "qwen_tokenizer" / "qwen.tiktoken", source / "qwen.tiktoken")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}})
    )
    chat = {"chat_format": "chatml", "eos_token_id": 151643, "max_window_size": 6144, "top_p": 0.8}
    (source / "generation_config.json").write_text(json.dumps(chat))
    convert(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|im_start|>user\n你好 123")["input_ids"] == [151644, 872, 198, 108386, 220, 16, 17, 18]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.generation_config.eos_token_id == [151645, 151643]
    assert model.generation_config.top_p == 0.8
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_an_official_gptq_folder_becomes_a_plain_qwen2_gptq_folder(
    gptq_v1_folder: Path, tmp_path: Path
) -> None:
    convert(gptq_v1_folder, tmp_path / "out")
    before, after = plain_tensors(gptq_v1_folder), plain_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["quantization_config"]["checkpoint_format"] == "gptq"
    beside = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert QuantConfig.read(beside) == QuantConfig.read(config) == QuantConfig(4, 32)


def test_settings_that_autogptqs_own_file_alone_has_go_into_config_json(
    gptq_v1_folder: Path, tmp_path: Path
) -> None:
    convert(gptq_v1_folder, tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    settings = config.pop("quantization_config")
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    done = convert(tmp_path / "first", tmp_path / "second")
    assert done.changes == ["GPTQ settings of quantize_config.json → config.json, too"]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"] == settings


def test_zero_points_go_to_v2_and_back(gptq_v1_folder: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    convert(gptq_v1_folder, first)
    done = convert(first, second, zeros="v2")
    assert done.changes == ["zero points gptq → gptq_v2"]
    stored = open_checkpoint(second).read("model.layers.0.mlp.up_proj.qzeros")
    assert {value & 0xFFFFFFFF for value in stored.flatten().tolist()} == {0x88888888}
    for file in ("config.json", "quantize_config.json"):
        assert QuantConfig.read(json.loads((second / file).read_text())).checkpoint_format == "gptq_v2"
    a, b = plain_tensors(first), plain_tensors(second)
    assert all(torch.equal(a[name], b[name]) for name in a)
    convert(second, third, zeros="v1")
    assert (third / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (third / "config.json").read_bytes() == (first / "config.json").read_bytes()
    assert convert(third, tmp_path / "fourth", zeros="v1").changes == []


def test_a_zero_point_that_v1_cannot_hold_leaves_nothing_behind(gptq_v1_folder: Path, tmp_path: Path) -> None:
    convert(gptq_v1_folder, tmp_path / "v2", zeros="v2")
    checkpoint = open_checkpoint(tmp_path / "v2")
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    module = "model.layers.1.self_attn.q_proj"
    zeros = torch.zeros(64, 2, dtype=torch.uint8)
    integers = torch.zeros(64, 64, dtype=torch.uint8)
    tensors |= pack(integers, torch.ones(64, 2), zeros, 4, "gptq_v2").tensors(module)
    config = checkpoint.config
    config["quantization_config"]["sym"] = False
    write_v1(tmp_path / "asym", config, tensors)
    with pytest.raises(QuantisationError, match="zero point is 0") as raised:
        convert(tmp_path / "asym", tmp_path / "out", zeros="v1")
    assert raised.value.where == f"{module}.qzeros"
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_shards_are_cut_anew_and_joined_again(v1_folder: Path, tmp_path: Path) -> None:
    done = convert(v1_folder, tmp_path / "many", max_shard_bytes=40_000)
    assert len(done.files) > 3
    assert all(file.is_file() for file in done.files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.total_bytes
    joined = convert(tmp_path / "many", tmp_path / "one")
    assert joined.changes == []
    convert(v1_folder, tmp_path / "direct")
    one, direct = (tmp_path / name / "model.safetensors" for name in ("one", "direct"))
    assert one.read_bytes() == direct.read_bytes()


def test_targets_that_would_lose_something_are_refused(v1_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="DST is SRC"):
        convert(v1_folder, v1_folder.parent / "." / "v1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds something"):
        convert(v1_folder, tmp_path / "full")
    with pytest.raises(UsageError, match="is a file"):
        convert(v1_folder, tmp_path / "full" / "thesis.txt")
    with pytest.raises(UsageError, match="--zeros"):
        convert(v1_folder, tmp_path / "out", zeros="v2")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert convert(v1_folder, tmp_path / "empty").tensors == 12 * 2 + 3


def test_a_failure_on_the_way_leaves_no_folder(
    v1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenq.models.qwen_v1 import QwenV1Source

    read = QwenV1Source.read

    def cut_notice(self: QwenV1Source, name: str) -> Any:
        if name == "model.norm.weight":
            raise CorruptFileError("the last sector is gone")
        return read(self, name)

    monkeypatch.setattr(QwenV1Source, "read", cut_notice)
    with pytest.raises(ModelError, match="last sector"):
        convert(v1_folder, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["v1"]


def logits_by_name_alone(folder: Path) -> torch.Tensor:
    """As auto-gptq 0.7 loads a model: tensors by name; what the files lack stays zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    settings = {key: config[key] for key in config if key not in ("model_type", "quantization_config")}
    untied = AutoConfig.for_model(config["model_type"], **settings | {"tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(untied, dtype=torch.float32).eval()
    source = DequantisedSource(open_checkpoint(folder).source, QuantConfig.read(config), torch.float32)
    stored = {name: source.read(name) for name in source.names()}
    model.load_state_dict(
        {name: stored.get(name, torch.zeros_like(empty)) for name, empty in model.state_dict().items()}
    )
    return logits_of(model, IDS)


@pytest.mark.parametrize("to", [None, "compressed-tensors"])
def test_a_tied_head_is_stored_for_readers_that_load_by_name(tmp_path: Path, to: Any) -> None:
    run(write_family(tmp_path / "m", "qwen2"), tmp_path / "gptq")
    wanted = logits_of(transformers_model(tmp_path / "gptq"), IDS)
    done = convert(tmp_path / "gptq", tmp_path / "out", to=to, store_head=True)
    assert "the embedding is stored a second time, as lm_head.weight" in done.changes
    (found,) = load(tmp_path / "out", device="cpu", dtype="float32").logits([IDS])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    if to is None:
        assert logits_by_name_alone(tmp_path / "gptq").count_nonzero() == 0
        torch.testing.assert_close(logits_by_name_alone(tmp_path / "out"), wanted, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"lm_head\.weight is stored already"):
        convert(tmp_path / "out", tmp_path / "again", store_head=True)


@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path, bits: int | None) -> None:
    """In a Qwen2 folder, plain or GPTQ; Qwen v1's are held against their config when they are opened."""
    v1 = small_config(), random_tensors(small_config())
    source = write_v1(tmp_path / "v1", *(v1 if bits is None else quantise_v1(*v1, bits, 32)))
    whole = open_checkpoint(convert(source, tmp_path / "whole").folder)
    tensors = {name: whole.read(name) for name in whole.names()}
    module = "model.layers.1.mlp.up_proj"
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{module}.")}
    without_norm = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    short = tensors | {"model.norm.weight": tensors["model.norm.weight"][:-1]}
    for damaged, says in (
        (rest, f"{module}.weight is missing"),
        (without_norm, "model.norm.weight is missing"),
        (short, r"model.norm.weight has shape \(63,\), config.json asks for \(64,\)"),
    ):
        folder = write_v1(tmp_path / "damaged", whole.config, damaged)
        with pytest.raises(ModelError, match=says) as raised:
            convert(folder, tmp_path / "out")
        assert raised.value.where == str(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_names_its_tensor_and_leaves_no_folder(tmp_path: Path, bad: float) -> None:
    tensors = random_tensors(small_config())
    tensors["transformer.h.1.ln_2.weight"][3] = bad
    with pytest.raises(CorruptFileError, match=r"layers\.1\.post_attention_layernorm\.weight holds \d NaN"):
        convert(write_v1(tmp_path / "v1", small_config(), tensors), tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["v1"]


def test_progress_counts_all_tensors(v1_folder: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    done = convert(v1_folder, tmp_path / "out", listener=seen.append)
    assert [(event.done, event.total) for event in seen if isinstance(event, Advance)] == [
        (number, done.tensors) for number in range(done.tensors)
    ]


def test_the_command_says_what_it_did(v1_folder: Path, tmp_path: Path) -> None:
    register()
    run = CliRunner().invoke(app, ["convert", str(v1_folder), str(tmp_path / "out"), "--max-shard", "100KB"])
    assert run.exit_code == 0, run.output
    assert "changed: Qwen v1 layout → Qwen2 layout" in run.output
    assert "27 tensors" in run.output
    again = CliRunner().invoke(app, ["convert", str(v1_folder), str(tmp_path / "out")])
    assert isinstance(again.exception, UsageError)
    assert CliRunner().invoke(app, ["convert", "a", "b", "--zeros", "v3"]).exit_code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500mb", 500_000_000), ("2GiB", 2 << 30), ("1.5 kB", 1500), ("77", 77)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 TB", "five"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_a_link_as_dst_is_refused_before_anything_is_written(v1_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UsageError, match=f"(?s)this is a link.*DST {tmp_path / 'empty'}"):
        convert(v1_folder, tmp_path / "link")
    assert convert(v1_folder, tmp_path / "empty").tensors
