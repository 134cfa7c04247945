"""Small random models as they are published: saved by transformers, laid out as on the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_model import PADDING_ROWS, _write_tokenizer

from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "rope_parameters": _ROPE,
    "tie_word_embeddings": False,
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_DEEPSTACK = {"deepstack_visual_indexes": [0]}
_MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_HYBRID = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
}
_MIXED = {**_MOE, "shared_expert_intermediate_size": 32}
_MROPE_HALF = {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_TEXT, **_MOE}),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**_TEXT, **_MOE, "rope_parameters": _MROPE},
            "vision_config": {**_VISION, **_DEEPSTACK},
        },
    ),
    "qwen3_next": ("Qwen3NextForCausalLM", {**_TEXT, **_HYBRID, **_MIXED}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", {**_TEXT, **_HYBRID, "rope_parameters": _MROPE_HALF}),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {"text_config": {**_TEXT, **_HYBRID, "rope_parameters": _MROPE_HALF}, "vision_config": _VISION},
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeForCausalLM",
        {**_TEXT, **_HYBRID, **_MIXED, "rope_parameters": _MROPE_HALF},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {**_TEXT, **_HYBRID, **_MIXED, "rope_parameters": _MROPE_HALF},
            "vision_config": _VISION,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": {**_VISION, **_DEEPSTACK}},
    ),
}
"""model_type → class of transformers, and what differs from its config's defaults."""

_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
}
_GEMMA = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": _ROPE,
    },
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA2 = {
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "query_pre_attn_scalar": 32,
    "attn_logit_softcapping": 2.0,  # of a trained one 50: here it has to be felt
    "final_logit_softcapping": 3.0,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
STRANGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {**_TEXT, **_IDS, "sliding_window": 8}),
    "olmoe": (
        "OlmoeForCausalLM",
        {**_TEXT, **_IDS, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_TEXT, **_IDS, **_MIXED}),
    "mixtral": (
        "MixtralForCausalLM",
        {**_TEXT, **_IDS, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", {**_TEXT, **_IDS, **_ROUTED}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**_TEXT, **_IDS, **_ROUTED, **_LATENT}),
    "gemma3_text": ("Gemma3ForCausalLM", {**_TEXT, **_IDS, **_GEMMA}),
    "gemma2": ("Gemma2ForCausalLM", {**_TEXT, **_IDS, **_GEMMA2}),
    "granite": (
        "GraniteForCausalLM",
        {**_TEXT, **_IDS, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
}
"""The same of model types that no table of the package describes."""


def write_published(folder: Path, family: str, **changes: Any) -> Path:
    """Write a model folder as transformers saves it, with a tokenizer; norms are random as in trained models.

    Args:
        folder: to make.
        family: a key of ``FAMILIES`` or ``STRANGERS``.
        changes: go over the config of the language model.
    """
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocab = _write_tokenizer(folder, bos=True) + PADDING_ROWS
    name, settings = {**FAMILIES, **STRANGERS}[family]
    if "text_config" in settings:
        settings = {**settings, "text_config": {**settings["text_config"], "vocab_size": vocab, **changes}}
        settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"]
    else:
        settings = {**settings, "vocab_size": vocab, **changes}
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(transformers.CONFIG_MAPPING[family](**settings)).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
        for name, tensor in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # stored, and no parameter
                tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Any) -> Path:
    """Replace the folder's tensors by what ``change`` makes of them: dict → dict."""
    file = folder / "model.safetensors"
    tensors = {name: value.contiguous() for name, value in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def language_config(folder: Path) -> dict[str, Any]:
    """The language model's part of config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config.get("text_config", config)


def fused(tensors: dict[str, torch.Tensor], *, transposed: bool = False) -> dict[str, torch.Tensor]:
    """Stack the experts of each block into tensors of three dimensions; ``transposed``: [expert, in, out]."""
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    rest = {}
    for name, tensor in tensors.items():
        if (m := _EXPERT.fullmatch(name)) is None or name.startswith("mtp."):
            rest[name] = tensor
        else:
            experts.setdefault(m[1], {}).setdefault(int(m[2]), {})[m[3]] = tensor
    for prefix, numbered in experts.items():
        each = [numbered[number] for number in sorted(numbered)]
        both = torch.stack([torch.cat([one["gate_proj"], one["up_proj"]]) for one in each])
        down = torch.stack([one["down_proj"] for one in each])
        rest[f"{prefix}.gate_up_proj"] = both.mT if transposed else both
        rest[f"{prefix}.down_proj"] = down.mT if transposed else down
    return rest


def with_draft_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add a draft head's tensors, in a dtype of their own."""
    draw = torch.Generator().manual_seed(3)
    return tensors | {
        "mtp.fc.weight": torch.randn(64, 128, generator=draw).bfloat16(),
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": torch.randn(32, 64, generator=draw).half(),
        "mtp.norm.weight": torch.randn(64, generator=draw),
    }


def write_dequantised(quantised: Path, target: Path) -> Path:
    """Write a quantised folder's model with plain weights, under the names and config of its base."""
    checkpoint = open_checkpoint(quantised)
    quant = QuantConfig.read(checkpoint.config)
    plain = DequantisedSource(checkpoint.source, quant, torch.float32)
    tensors = {}
    if checkpoint.view is not None:
        hidden = (n for n in checkpoint.view.whole.names() if not checkpoint.view.shown(n))
        tensors = {name: checkpoint.view.whole.read(name) for name in hidden}
    for name in plain.names():
        stored = checkpoint.view.published(name) if checkpoint.view is not None else name
        tensors[stored] = plain.read(name).contiguous()
    config = json.loads((quantised / "config.json").read_text())
    if config["model_type"] == "qwen3_vl_moe":  # transformers' class of this one loads fused experts alone
        tensors = {name: tensor.contiguous() for name, tensor in fused(tensors).items()}
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def transformers_of(folder: Path) -> Any:
    """The model of a folder of plain weights, of the class that its config.json names, in float32."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    return model.eval()


@torch.inference_mode()
def mean_kl(base: Any, other: Any, tokens: torch.Tensor) -> float:
    """Mean KL(base ‖ other) over the positions that the check counts: all but the last of a sequence."""
    logs = [model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1) for model in (base, other)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
