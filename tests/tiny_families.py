"""Small models of every supported architecture, in any dtype, and calibration sets for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_model import PADDING_ROWS, write_tiny_model

from qwenq.calibration.calibration_set import CalibrationSet
from qwenq.models.tokenizer import load_tokenizer

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_family(folder: Path, family: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A model folder with a tokenizer; norms and biases are random as well, as in trained models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "initializer_range": 0.04,  # blocks do not drown the embedding: Int4 is no disaster
        "torch_dtype": dtype,
    }
    changes = {"model_type": family, "architectures": [CLASSES[family]], **sizes, **changes}
    write_tiny_model(folder, **(changes | {"model_type": "llama", "num_hidden_layers": 1}))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": family, "num_hidden_layers": changes.get("num_hidden_layers", 3)}
    (folder / "config.json").write_text(json.dumps(config))
    settings = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    tensors = {}
    for name, drawn in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        value = drawn
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * torch.randn_like(drawn)
        elif name.endswith("bias"):
            value = 0.5 * torch.randn_like(drawn)
        tensors[name] = value.to(getattr(torch, dtype)).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_tokens(model: Path, samples: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """int64 [samples, seq_len], ids that the tokenizer has."""
    config = json.loads((model / "config.json").read_text())
    config = config.get("text_config", config)
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, config["vocab_size"] - PADDING_ROWS, (samples, seq_len), generator=draw)


def write_calibration(
    model: Path, path: Path, *, samples: int = 4, seq_len: int = 32, held_out: int = 2, seed: int = 0
) -> Path:
    """A saved set of random tokens, as `qwenq calibrate` would have written it for this model."""
    tokens = random_tokens(model, samples + held_out, seq_len, seed)
    return save_calibration(model, path, tokens[:samples].clone(), tokens[samples:].clone(), seed)


def save_calibration(
    model: Path, path: Path, tokens: torch.Tensor, held_out: torch.Tensor, seed: int = 0
) -> Path:
    origin = {
        "source": "test",
        "template": "plain",
        "seed": seed,
        "tokenizer": load_tokenizer(model).fingerprint,
    }
    others = "other documents" if len(held_out) else "none"
    CalibrationSet.of(tokens, held_out, **origin, held_out_from=others).save(path)
    return path
