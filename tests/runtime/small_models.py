"""Small random models of every family, as transformers builds them and as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models.plain_qwen_v1 import MemorySource
from transformers import AutoConfig, AutoModelForCausalLM

from qwenq.models.checkpoint import Checkpoint

VOCAB = 300

_MIXTURE = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "llama-linear-rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    },
    "qwen1.5": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1_000_000.0},
    "qwen2.5-yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-moe": {"model_type": "qwen3_moe", **_MIXTURE, "norm_topk_prob": True},
    "qwen3-moe-partly": {"model_type": "qwen3_moe", **_MIXTURE, "mlp_only_layers": [0]},
}
_SHARED = {"shared_expert_intermediate_size": 32}
_HYBRID = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3.5": {"model_type": "qwen3_5_text", **_HYBRID},
    "qwen3.5-yarn": {
        "model_type": "qwen3_5_text",
        **_HYBRID,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
        },
    },
    "qwen3.5-moe": {"model_type": "qwen3_5_moe_text", **_HYBRID, **_MIXTURE, **_SHARED},
    "qwen3-next": {"model_type": "qwen3_next", **_HYBRID, **_MIXTURE, **_SHARED},
}
"""Models with linear attention: a row of their caches cannot be rewound to an earlier token."""


def small_config(family: str, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        **{**FAMILIES, **HYBRIDS}[family],
        **changes,
    }


def small_model(family: str, **changes: Any) -> tuple[Any, Checkpoint]:
    """transformers' float32 model with weights far from neutral, and the same as a checkpoint in memory."""
    settings = small_config(family, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Hybrids store norms less one. With larger weights float32 itself is more than 1e-4 off float64.
        one = name.endswith("norm.weight") and (family not in HYBRIDS or ".linear_attn." in name)
        parameter.data = one + (0.1 if family in HYBRIDS else 0.2) * noise
    model.tie_weights()
    tensors = apart(dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return model, Checkpoint(Path("in-memory"), model.config.to_dict(), MemorySource(tensors))


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each expert's weights by themselves, as they lie in files."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for part, stacked in zip(leaves, tensor.chunk(len(leaves), dim=1), strict=True):
            found |= {f"{prefix}.{n}.{part}.weight": one.contiguous() for n, one in enumerate(stacked)}
    return found


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    return ids


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Float32 [tokens, vocab] of one sequence, by transformers."""
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits
