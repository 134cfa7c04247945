"""Qwen v1 written down plainly from its published definition: the oracle that the Qwen2 view is held against.

Also makes small v1 models and writes them as folders, and rewrites a Llama model into v1's layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwenq.errors import ModelError
from qwenq.models.source import TensorInfo


class MemorySource:
    """A TensorSource over a dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> Iterable[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self.read(name).shape), self.read(name).dtype)

    def read(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ModelError(f"no tensor {name}")
        return self.tensors[name]


def small_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "intermediate_size": 192,  # w1 and w2 together
        "vocab_size": 256,
        "seq_length": 64,
        "max_position_embeddings": 128,
        "rotary_emb_base": 10_000,
        "layer_norm_epsilon": 1e-6,
        "no_bias": True,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "bf16": False,
        "fp16": False,
        "fp32": True,
        **changes,
    }


def original_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with the keys of August 2023."""
    renamed = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "n_positions",
        "vocab_size": "padded_vocab_size",
    }
    return {renamed.get(key, key): value for key, value in config.items()}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights of a v1 model, in v1's names; norms and biases are far from neutral."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    h, ffn, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    tensors = {"transformer.wte.weight": normal(vocab, h, std=1.0)}
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        tensors |= {
            f"{block}.ln_1.weight": 1 + normal(h),
            f"{block}.attn.c_attn.weight": normal(3 * h, h),
            f"{block}.attn.c_attn.bias": normal(3 * h),
            f"{block}.attn.c_proj.weight": normal(h, h),
            f"{block}.ln_2.weight": 1 + normal(h),
            f"{block}.mlp.w1.weight": normal(ffn, h),
            f"{block}.mlp.w2.weight": normal(ffn, h),
            f"{block}.mlp.c_proj.weight": normal(h, ffn),
        }
    tensors["transformer.ln_f.weight"] = 1 + normal(h)
    tensors["lm_head.weight"] = normal(vocab, h)
    return tensors


def write_v1(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotary_base(config: Mapping[str, Any], tokens: int) -> float:
    """Dynamic NTK, fixed at prefill."""
    base, s, d = float(config["rotary_emb_base"]), config["seq_length"], config["kv_channels"]
    if not config["use_dynamic_ntk"] or tokens <= s:
        return base
    alpha = max(2 ** math.ceil(math.log2(tokens / s) + 1) - 1, 1)
    return base * alpha ** (d / (d - 2))


def rotate(x: Tensor, base: float) -> Tensor:
    """NeoX rotation of [tokens, heads, d]: halves (a, b) turn by position * frequency."""
    tokens, _, d = x.shape
    frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * frequencies  # [tokens, d / 2]
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(x: Tensor, block: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    tokens, hidden = x.shape
    d = config["kv_channels"]
    fused = x @ tensors[f"{block}.attn.c_attn.weight"].T + tensors[f"{block}.attn.c_attn.bias"]
    q, k, v = (part.view(tokens, hidden // d, d) for part in fused.split(hidden, dim=-1))
    base = rotary_base(config, tokens)
    q, k = rotate(q, base), rotate(k, base)
    if config["use_logn_attn"] and tokens > config["seq_length"]:
        s = config["seq_length"]
        logn = [max(math.log(p + 1) / math.log(s), 1.0) for p in range(tokens)]
        q = q * torch.tensor(logn)[:, None, None]
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, v).reshape(tokens, hidden)
    return mixed @ tensors[f"{block}.attn.c_proj.weight"].T


def forward(config: Mapping[str, Any], tensors: Mapping[str, Tensor], ids: list[int]) -> Tensor:
    """Logits [tokens, vocab] of one sequence, float32."""
    eps = config["layer_norm_epsilon"]
    x = tensors["transformer.wte.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        x = x + attention(rms_norm(x, tensors[f"{block}.ln_1.weight"], eps), block, config, tensors)
        y = rms_norm(x, tensors[f"{block}.ln_2.weight"], eps)
        w1, w2 = (y @ tensors[f"{block}.mlp.{name}.weight"].T for name in ("w1", "w2"))
        x = x + (w1 * torch.nn.functional.silu(w2)) @ tensors[f"{block}.mlp.c_proj.weight"].T
    return rms_norm(x, tensors["transformer.ln_f.weight"], eps) @ tensors["lm_head.weight"].T


def llama_to_v1(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A Llama model in v1's layout: grouped keys and values repeated to full heads, zero biases in c_attn."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    repeats, d = heads // config["num_key_value_heads"], hidden // heads

    def full(name: str) -> Tensor:
        return tensors[name].view(-1, d, hidden).repeat_interleave(repeats, dim=0).reshape(hidden, hidden)

    embedding = tensors["model.embed_tokens.weight"]
    out = {
        "transformer.wte.weight": embedding,
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors.get("lm_head.weight", embedding).clone(),
    }
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"transformer.h.{layer}"
        q = tensors[f"{old}.self_attn.q_proj.weight"]
        k, v = full(f"{old}.self_attn.k_proj.weight"), full(f"{old}.self_attn.v_proj.weight")
        out |= {
            f"{new}.ln_1.weight": tensors[f"{old}.input_layernorm.weight"],
            f"{new}.attn.c_attn.weight": torch.cat([q, k, v]),
            f"{new}.attn.c_attn.bias": q.new_zeros(3 * hidden),
            f"{new}.attn.c_proj.weight": tensors[f"{old}.self_attn.o_proj.weight"],
            f"{new}.ln_2.weight": tensors[f"{old}.post_attention_layernorm.weight"],
            f"{new}.mlp.w2.weight": tensors[f"{old}.mlp.gate_proj.weight"],
            f"{new}.mlp.w1.weight": tensors[f"{old}.mlp.up_proj.weight"],
            f"{new}.mlp.c_proj.weight": tensors[f"{old}.mlp.down_proj.weight"],
        }
    rope = config.get("rope_parameters") or {}
    v1 = small_config(
        hidden_size=hidden,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        kv_channels=d,
        intermediate_size=2 * config["intermediate_size"],
        vocab_size=config["vocab_size"],
        seq_length=config["max_position_embeddings"],
        max_position_embeddings=config["max_position_embeddings"],
        rotary_emb_base=config.get("rope_theta", rope.get("rope_theta")),
        layer_norm_epsilon=config["rms_norm_eps"],
        **{key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config},
    )
    return v1, out


def quantise_v1(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: int, group_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Round-to-nearest GPTQ folder as AutoGPTQ wrote it: fused c_attn, a (zero) bias beside every linear."""
    from qwenq.models.gptq_format import pack

    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(("c_attn", "c_proj", "w1", "w2")) or name == f"{module}.bias":
            out[name] = tensor.half()
            continue
        grouped = tensor.unflatten(1, (-1, group_size))  # [out, groups, group_size]
        scales = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        middle = 2 ** (bits - 1)
        integers = (grouped / scales.float().unsqueeze(-1)).round().add(middle).clamp(0, 2**bits - 1)
        zeros = torch.full_like(scales, middle).to(torch.uint8)
        out |= pack(integers.to(torch.uint8).flatten(1), scales, zeros, bits).tensors(module)
        if f"{module}.bias" not in tensors:
            out[f"{module}.bias"] = torch.zeros(tensor.shape[0], dtype=torch.float16)
    settings = {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    quantised = {**config, "fp16": True, "fp32": False}
    return {**quantised, "quantization_config": {**settings, "quant_method": "gptq"}}, out
