"""A Qwen v1 folder through the commands: what `quantize` makes of it, and what it will not compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from dequantised import logits_of, transformers_model
from models.plain_qwen_v1 import random_tensors, small_config, write_v1
from runtime.small_chat import REAL_VOCAB, write_chat_folder
from tiny_families import write_calibration
from typer.testing import CliRunner

from qwenq.cli.app import app, register
from qwenq.errors import UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_format import quantised_modules
from qwenq.models.tokenizer import load_tokenizer
from qwenq.runtime.engine import load
from qwenq.runtime.sampling import Sampling

register()
runner = CliRunner()
REMOTE = {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
TEXTS = [
    "Quantise the weights.",
    "你好，世界 ١٢٣",
    "def f(x):\n\treturn x**2  # 😀\r\n\n",
    "naïve e\u0301 <|im_end|>",
]


def quantise(base: Path, out: Path, *options: str) -> Path:
    tokens = write_calibration(base, out.with_suffix(".safetensors"))
    arguments = ["quantize", str(base), "--calibration", str(tokens), "--out", str(out), *options]
    done = runner.invoke(
        app,
        [*arguments, "--dtype", "float32", "--device", "cpu"],
        env={"QWENQ_CACHE": str(out.parent / "cache")},
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny v1 chat folder with code that must never run."""
    folder = write_chat_folder(tmp_path_factory.mktemp("v1") / "Qwen-Tiny-Chat", auto_map=REMOTE)
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("modeling_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')")
    return folder


@pytest.fixture(scope="module", params=[4, 8])
def made(request: pytest.FixtureRequest, base: Path) -> Path:
    return quantise(base, base.parent / f"int{request.param}", "--bits", str(request.param))


def test_it_is_a_qwen2_folder_without_remote_code(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert config["qwen_v1"]["seq_length"] == 4096
    assert not list(made.glob("*.py"))
    assert not [file for file in made.glob("*.json") if "auto_map" in file.read_text()]
    modules = quantised_modules(open_checkpoint(made).source)
    assert len(modules) == 2 * 7
    assert "model.layers.1.self_attn.k_proj" in modules
    transformers_model(made)  # takes every tensor, under Qwen2's names, and misses none


def test_its_tokenizer_loads_with_autotokenizer_and_gives_our_ids(made: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(made), load_tokenizer(base)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, special=True)
    assert load_tokenizer(made).fingerprint == ours.fingerprint


def test_logits_of_transformers_are_ours(made: Path) -> None:
    ids = torch.randint(0, REAL_VOCAB, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = logits_of(transformers_model(made), ids)
    assert expected.std() > 0.1
    for engine in ("fast", "transformers"):
        (found,) = load(made, device="cpu", dtype="float32", engine=engine).logits([ids])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_padded_rows_of_the_vocabulary_are_never_sampled(made: Path) -> None:
    def drawn(real_vocab: int | None) -> list[int]:
        runner = load(made, device="cpu", dtype="float32", real_vocab=real_vocab)
        hot = Sampling(temperature=50.0)  # all ids are about as likely: 16 of 480 are padding
        return runner.generate([[7, 3, 250]], 300, sampling=hot, exact_tokens=True).answers[0].ids

    real = load_tokenizer(made).vocab_size
    assert real == REAL_VOCAB
    assert max(drawn(None)) >= REAL_VOCAB  # else nothing is shown here
    assert max(drawn(real)) < REAL_VOCAB


@pytest.mark.slow
def test_the_released_vocabulary_keeps_its_padding(shared_data: Path, tmp_path: Path) -> None:
    """Qwen's own 151,936 rows: the quantised folder alone says which of them are real."""
    from transformers import AutoTokenizer

    config = small_config(hidden_size=16, num_attention_heads=1, vocab_size=151936, num_hidden_layers=1)
    tensors = random_tensors(config)
    tensors["lm_head.weight"][151851:] *= 100  # greedy would take them
    source = write_v1(tmp_path / "v1", config, tensors)
    shutil.copyfile(shared_data / "qwen_tokenizer" / "qwen.tiktoken", source / "qwen.tiktoken")
    (source / "generation_config.json").write_text(json.dumps({"chat_format": "chatml"}))
    out = quantise(source, tmp_path / "out", "--bits", "8", "--group-size", "-1")
    runner = load(out, device="cpu", dtype="float32")
    assert (runner.vocab_size, runner.real_vocab) == (151936, 151851)
    (logits,) = runner.logits([[1, 2, 3]])
    assert int(logits[-1].argmax()) >= 151851
    assert max(runner.generate([[1, 2, 3]], 12, exact_tokens=True).answers[0].ids) < 151851
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text, special=True)
    assert ours.eos_ids[:2] == (151645, 151643)  # it still is a chat model


# Beyond the trained length, where quantising would compute plain RoPE


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """Trained on 64 tokens, goes on to 128 by dynamic NTK and logn."""
    return write_chat_folder(tmp_path / "short", seq_length=64, max_position_embeddings=128)


def refused(*arguments: object) -> str:
    done = runner.invoke(app, list(map(str, arguments)))
    assert isinstance(done.exception, UsageError), (done.output, done.exception)
    return str(done.exception)


def test_longer_sequences_than_it_was_trained_on_are_refused_aloud(short: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "q", tmp_path / "text.txt"
    text.write_text("Quantise the weights, and measure what it cost.\n" * 300)
    sizes = ["--samples", 2, "--seq-len", 65]
    long = write_calibration(short, tmp_path / "long.safetensors", seq_len=65)
    for said in (
        refused("quantize", short, "--calibration", text, *sizes, "--out", out),
        refused("quantize", short, *sizes, "--out", out),
        refused("quantize", short, "--calibration", long, "--out", out),
        refused("calibrate", short, "--source", text, *sizes, "--out", tmp_path / "c.safetensors"),
    ):
        assert "is 65 tokens, but beyond 64 this Qwen v1 model changes its attention" in said
        assert "give at most 64" in said
    assert not list(tmp_path.glob("q*"))


def test_without_its_flags_it_is_a_plain_qwen2_at_any_length(tmp_path: Path) -> None:
    flags = {"use_dynamic_ntk": False, "use_logn_attn": False}
    folder = write_chat_folder(tmp_path / "m", seq_length=64, max_position_embeddings=128, **flags)
    tokens = write_calibration(folder, tmp_path / "long.safetensors", seq_len=65)
    out = tmp_path / "q"
    arguments = ["quantize", str(folder), "--calibration", str(tokens), "--out", str(out), "--bits", "8"]
    done = runner.invoke(app, [*arguments, "--device", "cpu"], env={"QWENQ_CACHE": str(tmp_path / "cache")})
    assert done.exit_code == 0, (done.output, done.exception)


def test_the_check_measures_no_longer_ones_either(short: Path, tmp_path: Path) -> None:
    quantised = write_chat_folder(tmp_path / "q", bits=8, seq_length=64, max_position_embeddings=128)
    text = tmp_path / "text.txt"
    text.write_text("Quantise the weights, and measure what it cost.\n" * 300)
    check = ["check", quantised, "--against", short, "--text", text, "--device", "cpu"]
    assert "beyond 64 this Qwen v1 model" in refused(*check, "--seq-len", 65)
    done = runner.invoke(app, [*map(str, check), "--samples", "2", "--json"])  # its own default does
    assert json.loads(done.stdout)["seq_len"] == 64
