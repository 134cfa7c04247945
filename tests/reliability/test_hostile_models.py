"""What a stranger may try with a model folder: each a story of its own, refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Tally, attempt
from safetensors.torch import load_file, save_file
from tiny_families import write_family

from qwenq.errors import QwenqError
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.tokenizer import load_tokenizer
from qwenq.models.transformers_model import transformers_config

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_family(tmp_path_factory.mktemp("strangers") / "tiny")
    attempt(Tally(), 10**9, lambda: use(made))  # all is imported and warm
    return made


def use(folder: Path) -> None:
    """Text to ids, ids to logits, block by block."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("a text of " + "a" * 60 + "b")
    assert len(ids) < 200, "a short text stays short"
    tokenizer.decode(ids)
    compute(folder)


def compute(folder: Path) -> None:
    """The same without its tokenizer."""
    checkpoint = open_checkpoint(folder)
    decoder = BlockwiseDecoder(checkpoint, torch.device("cpu"), torch.float32)
    hidden = decoder.embed([torch.arange(8)[None]])[0]
    for index in range(len(decoder.names)):
        with decoder.block(index) as block:
            hidden = decoder.forward(block, hidden)
    with decoder.head() as head:
        assert bool(head(hidden).isfinite().all()), "logits that are no numbers"


def edited(name: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_bytes())
        (folder / name).write_text(json.dumps(value | changes))

    return change


def retyped(name: str, dtype: torch.dtype) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / "model.safetensors")

    return change


def header(shape: list[int]) -> Change:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    whole = struct.pack("<Q", len(text)) + text + bytes(4)
    return lambda folder: (folder / "model.safetensors").write_bytes(whole)


def grown(name: str) -> Change:
    """A file with a hole: 20 GB that take no room."""

    def change(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, 20_000_000_000)

    return change


def rule(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(pieces: int) -> dict[str, Any]:
    single = [{"Sequence": {"id": "A", "type_id": 0}}] * pieces
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"
LINEAR = "model.layers.0.self_attn.q_proj.weight"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}
INDEX = "model.safetensors.index.json"
REFUSED: dict[str, tuple[Change, str]] = {
    "a dimension too many, a million times": (header([1] * 1_000_000), "entry of a is damaged"),
    "a product of 200,000 huge dimensions": (header([2**62] * 200_000), "entry of a is damaged"),
    "an index that is a folder": (lambda folder: (folder / INDEX).mkdir(), "Is a directory"),
    "config.json of 20 GB": (grown("config.json"), "20.0 GB"),
    "tokenizer.json of 20 GB": (grown("tokenizer.json"), "20.0 GB"),
    "a chat template of 20 GB": (grown("chat_template.jinja"), "20.0 GB"),
    "an index of 20 GB": (grown(INDEX), "20.0 GB"),
    "linear weights in float8": (retyped(LINEAR, torch.float8_e4m3fn), "not a plain weight"),
    "linear weights of integers": (retyped(LINEAR, torch.int8), "not a plain weight"),
    "an embedding of booleans": (retyped(EMBEDDING, torch.bool), "not a plain weight"),
    "an embedding in float8": (retyped(EMBEDDING, torch.float8_e5m2), "not a plain weight"),
    "norms of complex numbers": (retyped(NORM, torch.complex64), "not a plain weight"),
    "a vocabulary of 67 million": (edited("config.json", vocab_size=1 << 26), "weight has shape"),
    "positions divided by zero": (
        edited("config.json", rope_scaling=LLAMA3 | {"factor": 0, "original_max_position_embeddings": 64}),
        "factor = 0",
    ),
    "a thousand million labels": (edited("config.json", num_labels=10**9), "num_labels"),
    "a window of no tokens": (
        edited("config.json", use_sliding_window=True, sliding_window=0, max_window_layers=0),
        "sliding_window = 0",
    ),
    "a rule without end": (edited("tokenizer.json", pre_tokenizer=rule("(a+)+$")), "fails on a text"),
    "a normalizer without end": (
        edited("tokenizer.json", normalizer=rule("(a+)+$") | {"type": "Replace", "content": "x"}),
        "fails on a text",
    ),
    "a novel before each word": (
        edited("tokenizer.json", normalizer={"type": "Prepend", "prepend": "z" * 1_000_000}),
        "times as long",
    ),
    "each text a thousand times": (edited("tokenizer.json", post_processor=template(1000)), "1000 times"),
    "a class with other needs": (
        edited("tokenizer_config.json", tokenizer_class="BertTokenizer"), "fails on a text|cannot load"
    ),
    "a length that is a word": (
        edited("tokenizer_config.json", model_max_length="many"), "fails on a text|cannot load"
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", REFUSED)
@pytest.mark.timeout(60)
def test_a_strangers_folder_is_refused_in_words(
    sound: Path, tmp_path: Path, tally: Tally, story: str
) -> None:
    change, said = REFUSED[story]
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    change(folder)
    assert not attempt(tally, 2_000_000, lambda: use(folder))
    with pytest.raises(QwenqError, match=said):
        use(folder)


IGNORED: dict[str, dict[str, Any]] = {
    "labels of a classifier": {"id2label": {"0": "\x1b[2J"}, "label2id": {"x": 0}, "problem_type": "x"},
    "a tuple in the place of an answer": {"return_dict": False, "use_return_dict": False},
    "everything in between as well": {"output_attentions": True, "output_hidden_states": True},
    "a plan of its own": {"base_model_tp_plan": 3, "base_model_pp_plan": "x", "sub_configs": {"a": {}}},
    "another folder's name": {"_name_or_path": "../../etc/passwd", "transformers_weights": "../x"},
    "code of its own": {"auto_map": {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.Y"}},
}


@pytest.mark.parametrize("story", IGNORED)
@pytest.mark.timeout(60)
def test_what_says_nothing_about_the_weights_changes_nothing(
    sound: Path, tmp_path: Path, tally: Tally, story: str
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    edited("config.json", **IGNORED[story])(folder)
    (folder / "evil.py").write_text("from pathlib import Path; Path('pwned').touch()")
    assert attempt(tally, 1_000_000, lambda: compute(folder))
    assert not Path("pwned").exists()
    config = transformers_config(open_checkpoint(folder).config, folder)
    plain = transformers_config(open_checkpoint(sound).config, sound)
    assert config.num_labels == plain.num_labels
    assert config.return_dict is True
    assert not config.output_attentions
