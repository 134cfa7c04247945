"""The sizes in a config.json, checked: dense Llama, Qwen2, Qwen3, and Qwen v1 with either key set."""

from __future__ import annotations

from typing import Any

from qwenq.errors import ModelError, UnsupportedError

_NOT_YET = {
    "num_experts": "mixture-of-experts layers",
    "num_local_experts": "mixture-of-experts layers",
    "n_routed_experts": "mixture-of-experts layers",
    "linear_num_value_heads": "linear-attention layers",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_V1_OLD_KEYS = {  # the keys used since September 2023 -> config.json of August 2023
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "n_positions",
}


def sizes_of(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ``ModelShape``, from a config.json.

    Raises:
        UnsupportedError: an architecture that is not one of these, or not dense.
        ModelError: a size is missing, not a positive integer, or contradicts another one.
    """
    kind = str(config.get("model_type"))
    if kind == "qwen":
        return _sizes_of_v1(config)
    _refuse_unsupported(kind, config)
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    kv_heads = _size(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ModelError(
            f"{heads} attention heads cannot share {kv_heads} key/value heads",
            where="config.json: num_attention_heads, num_key_value_heads",
            hint="the number of heads has to be a multiple of the number of key/value heads",
        )
    attention_bias = bool(config.get("attention_bias", False))
    return {
        "architecture": kind,
        "hidden": hidden,
        "layers": _size(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": _head_dim(config, hidden, heads),
        "ffn": _size(config, "intermediate_size"),
        "vocab": _size(config, "vocab_size"),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "context": _size(config, "max_position_embeddings"),
        "qkv_bias": kind == "qwen2" or attention_bias,  # Qwen2 has it in the code, whatever the config says
        "o_bias": kind != "qwen2" and attention_bias,
        "mlp_bias": kind == "llama" and bool(config.get("mlp_bias", False)),
        "qk_norm": kind == "qwen3",
    }


def _sizes_of_v1(config: dict[str, Any]) -> dict[str, Any]:
    keys = _with_new_keys(config)
    hidden, heads = _size(keys, "hidden_size"), _size(keys, "num_attention_heads")
    head_dim = _size(keys, "kv_channels", default=hidden // heads)
    both_halves = _size(keys, "intermediate_size")
    if head_dim * heads != hidden:
        raise ModelError(
            f"{heads} heads of kv_channels {head_dim} do not make hidden_size {hidden}",
            where="config.json: kv_channels",
            hint="compare with the config.json that the model was published with",
        )
    if both_halves % 2:
        raise ModelError(
            f"intermediate_size {both_halves} is odd; Qwen v1 counts two equal halves",
            where="config.json: intermediate_size",
            hint="compare with the config.json that the model was published with",
        )
    return {
        "architecture": "qwen2",
        "hidden": hidden,
        "layers": _size(keys, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "ffn": both_halves // 2,
        "vocab": _size(keys, "vocab_size"),
        "tied": bool(keys.get("tie_word_embeddings", False)),
        "context": _size(keys, "max_position_embeddings"),
        "qkv_bias": True,
        "fused_qkv": True,
    }


def _with_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A Qwen v1 config under today's keys; where both sets are present they have to agree."""
    keys = dict(config)
    for new, old in _V1_OLD_KEYS.items():
        if keys.get(new) is None:
            keys[new] = config.get(old)
        elif config.get(old) not in (None, keys[new]):
            raise ModelError(
                f"{new} is {keys[new]} but {old} is {config[old]}",
                where=f"config.json: {new}, {old}",
                hint="keep one of the two key sets",
            )
    if config.get("padded_vocab_size") is not None:  # the rows that exist; vocab_size counted the real ids
        keys["vocab_size"] = config["padded_vocab_size"]
    return keys


def _size(config: dict[str, Any], key: str, *, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ModelError(
            f"{key} is {'missing' if value is None else repr(value)}; it has to be a positive whole number",
            where=f"config.json: {key}",
            hint="is this the config.json of a dense Llama, Qwen2, Qwen3 or Qwen v1 model?",
        )
    return value


def _head_dim(config: dict[str, Any], hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    if hidden % heads:
        raise ModelError(
            f"hidden_size {hidden} is no multiple of {heads} heads, and head_dim is not given",
            where="config.json: head_dim",
            hint="add head_dim, or correct num_attention_heads",
        )
    return hidden // heads


def _refuse_unsupported(kind: str, config: dict[str, Any]) -> None:
    missing = {what for key, what in _NOT_YET.items() if config.get(key)}
    if "linear_attention" in (config.get("layer_types") or ()):
        missing.add("linear-attention layers")
    if kind in _ARCHITECTURES and not missing:
        return
    needs = f"{kind} needs {' and '.join(sorted(missing))}" if missing else f"model_type {kind!r}"
    raise UnsupportedError(
        f"not yet: {needs}",
        where="config.json: model_type",
        hint="dense Llama, Qwen v1, Qwen1.5, Qwen2, Qwen2.5 and Qwen3 models are supported",
    )
