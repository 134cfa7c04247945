"""config.json and manifests from strangers: checked before anything is built on them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Tally, attempt, budget
from hostile_bytes import VALUES, as_json, damaged_json
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_families import write_family

from qwenq.evals.rows import append_check_rows, has_check
from qwenq.models import gptq_config
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.identity import base_of, model_name
from qwenq.models.integrity import verify_files
from qwenq.models.safetensors_files import open_safetensors
from qwenq.models.shapes import ModelShape
from qwenq.models.source import TensorSource
from qwenq.results import Model, read_rows

LARGE: list[Any] = [*VALUES, 10_000, 1 << 16, 1 << 20, 1 << 24, 2**31 - 1, "linear", "dynamic", "silu", 1e-9]
V1 = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 16, "vocab_size": 300, "seq_length": 64,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "use_dynamic_ntk": True, "use_logn_attn": True,
    "torch_dtype": "float32", "no_bias": True, "tie_word_embeddings": False, "n_embd": 64,
}  # fmt: skip
ROPE = {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 128}
EXTRA = {"rope_scaling": ROPE, "sliding_window": 64, "use_sliding_window": False, "attention_bias": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: write_family(folder / name, name) for name in ("llama", "qwen2", "qwen3")}
    for path in made.values():
        attempt(Tally(), 10**9, lambda path=path: use(path))  # all is imported and warm
    return made


def use(folder: Path) -> None:
    """As quantising begins: open, build the blocks, run the first."""
    checkpoint = open_checkpoint(folder)
    ModelShape.from_config(checkpoint.config)
    decoder = BlockwiseDecoder(checkpoint, torch.device("cpu"), torch.float32)
    hidden = decoder.embed([torch.arange(8)[None]])
    with decoder.block(0) as block:
        decoder.forward(block, hidden[0])
    with decoder.head() as head:
        head(hidden[0])


def config_of(family: str) -> dict[str, Any]:
    """As ``write_family`` writes it, with the rarer keys; the sizes are those of the weights."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 325, **heads}
    other = {
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
    flags = {"tie_word_embeddings": True, "torch_dtype": "float32", "initializer_range": 0.04}
    kinds = {"layer_types": ["full_attention"] * 3, "bos_token_id": 1, "eos_token_id": [2, 3]}
    return {"model_type": family, "architectures": ["X"], **sizes, **other, **flags, **kinds, **EXTRA}


@budget(3)
@given(
    case=st.sampled_from(["llama", "qwen2", "qwen3"]).flatmap(
        lambda family: st.tuples(st.just(family), damaged_json(config_of(family), LARGE))
    )
)
@example(case=("llama", json.dumps(config_of("llama") | {"num_hidden_layers": None}).encode()))  # long run
def test_config_json(models: dict[str, Path], tally: Tally, case: tuple[str, bytes]) -> None:
    family, raw = case
    (models[family] / "config.json").write_bytes(raw)
    weights = (models[family] / "model.safetensors").stat().st_size
    attempt(tally, weights + len(raw), lambda: use(models[family]))


@budget(2)
@given(raw=damaged_json(V1, LARGE))
def test_config_json_of_qwen_v1(models: dict[str, Path], tally: Tally, raw: bytes) -> None:
    folder = models["llama"].parent / "v1"
    folder.mkdir(exist_ok=True)
    shutil.copy(models["qwen2"] / "model.safetensors", folder)
    (folder / "config.json").write_bytes(raw)
    attempt(tally, 100_000 + len(raw), lambda: open_checkpoint(folder))


GPTQ = {
    "bits": 4, "group_size": 16, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
    "quant_method": "gptq", "checkpoint_format": "gptq", "lm_head": False,
}  # fmt: skip


@budget(2)
@given(raw=damaged_json(GPTQ, LARGE))
@example(raw=b"[]")  # was an AttributeError
def test_quantize_config_json(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    """The file itself, which counts in a Qwen v1 folder whose config.json says nothing."""
    folder = tmp_path_factory.mktemp("gptq")
    weights = save(
        {
            "transformer.wte.weight": torch.zeros(300, 64),
            "transformer.h.0.attn.c_attn.qweight": torch.zeros(8, 192, dtype=torch.int32),
        }
    )
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(V1 | {"num_hidden_layers": 1}))
    (folder / "quantize_config.json").write_bytes(raw)
    attempt(tally, len(weights) + len(raw), lambda: open_checkpoint(folder))
    source = open_safetensors(folder)
    assert source is not None
    attempt(tally, len(weights) + len(raw), lambda: settings_of(folder, source))


def settings_of(folder: Path, source: TensorSource) -> None:
    """As the folder is opened, without what its weights lack."""
    found = gptq_config.settings_of(folder, V1, source.names())
    assert found is not None
    assert found.bits in (2, 3, 4, 8)
    assert found.group_size == -1 or 0 < found.group_size <= 2**31


MODEL = Model("M", "sha256:m", "int4", "M")
SEVEN = b"7 bytes"
HASH = hashlib.sha256(SEVEN).hexdigest()
MANIFEST = {
    "format": "qwenq-1",
    "made_by": "qwenq 0.1.0",
    "base": {"model": "Qwen/Qwen2.5-0.5B", "fingerprint": "0123456789abcdef"},
    "recipe": {"bits": 4},
    "calibration": {"source": "self", "tokens": "abc"},
    "check": {
        "kl": {"value": 0.1, "low": 0.08, "high": 0.12},
        "same_top": {"value": 0.8, "low": 0.7, "high": 0.9},
        "perplexity_ratio": {"value": 1.05, "low": None, "high": None},
        "sequences": 8, "seq_len": 64, "tokens": 504, "dtype": "float32", "device": "cpu",
        "modules": [{"name": "model.layers.0.mlp.up_proj", "error": 0.01, "rtn_error": 0.02}],
        "kl_by_position": [{"first": 1, "last": 32, "n": 256, "value": 0.15, "low": 0.1, "high": 0.2}],
    },
    "files": {"config.json": {"bytes": 7, "sha256": HASH}, "model.safetensors": {"sha256": HASH}},
}  # fmt: skip


def without(*keys: str) -> bytes:
    """The manifest less what these keys lead to."""
    made = copy.deepcopy(MANIFEST)
    place: Any = made
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return as_json(made)


@budget(2)
@given(raw=damaged_json(MANIFEST))
@example(raw=without("check", "kl_by_position"))  # as older ones are
@example(raw=without("made_by"))  # was a KeyError, as was the next
@example(raw=without("check", "kl"))
@example(raw=as_json(MANIFEST | {"check": MANIFEST["check"] | {"same_top": 0.8}}))  # was a TypeError
@example(raw=as_json(MANIFEST | {"base": {"model": 7}}))  # was a TypeError
def test_manifests(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    outside = tmp_path_factory.mktemp("manifest")
    folder = outside / "model"
    folder.mkdir()
    (outside / "secret").write_bytes(b"secret")
    for name in MANIFEST["files"]:
        (folder / name).write_bytes(SEVEN)
    (folder / "qwenq.json").write_bytes(raw)
    attempt(tally, len(raw), lambda: verify_files(folder))
    attempt(tally, len(raw), lambda: model_name(base_of(folder).get("model")))
    has_check(folder)
    if attempt(tally, len(raw), lambda: append_check_rows(folder, MODEL, outside / "run")):
        assert len(read_rows(outside / "run")) == 3, "what is recorded can be read again"
    else:
        assert not (outside / "run").exists()


def test_more_layers_than_there_are_weights_are_refused_before_they_are_built(
    models: dict[str, Path], tally: Tally
) -> None:
    folder = models["llama"]
    (folder / "config.json").write_text(json.dumps(config_of("llama") | {"num_hidden_layers": 10_000}))
    assert not attempt(tally, 200_000, lambda: use(folder))
    assert tally.slowest < 2
