"""config.json and generation_config.json of Qwen v1 (``QWenLMHeadModel``), said in Qwen2's words.

Two key sets were published: the first release (August 2023) used GPT-2's names, all later ones the usual
names. Both are read; where a file has both, they have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenq.errors import ModelError

REAL_VOCAB = 151_851  # ids of the tokenizer; the rows above pad the embedding and are never sampled
END_OF_TEXT, IM_END = 151_643, 151_645
V1_KEY = "qwen_v1"
"""Key of the Qwen2 config under which what only v1 has is kept: long-context flags, real vocabulary."""

_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "n_positions",
}
_DEFAULTS: dict[str, Any] = {  # of QWenConfig, for keys that a config.json may leave out
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10_000,
    "seq_length": 2048,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_SAMPLING_KEYS = ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "max_new_tokens")


def qwen2_config(config: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """The Qwen2 config of a Qwen v1 config; below ``seq_length`` tokens it describes the very same model.

    Args:
        config: config.json of a v1 model, in either key set. It is not changed.
        dtype: of the weights, for ``torch_dtype``; None: what config.json says.

    Raises:
        ModelError: a key is missing, or two contradict each other; names them.
    """
    hidden = _count(config, "hidden_size")
    vocab = _vocab(config)
    plain = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": _half(_count(config, "intermediate_size")),
        "num_hidden_layers": _count(config, "num_hidden_layers"),
        "num_attention_heads": _heads(config, hidden),
        "num_key_value_heads": _heads(config, hidden),
        "hidden_act": "silu",
        "max_position_embeddings": _positions(config),
        "rms_norm_eps": _get(config, "layer_norm_epsilon"),
        "rope_theta": float(_get(config, "rotary_emb_base")),
        "vocab_size": vocab,
        "tie_word_embeddings": _get(config, "tie_word_embeddings"),
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": _get(config, "initializer_range"),
        "use_cache": True,
        **_token_ids(config, vocab),
        V1_KEY: {
            "seq_length": _get(config, "seq_length"),
            "use_dynamic_ntk": _flag(config, "use_dynamic_ntk"),
            "use_logn_attn": _flag(config, "use_logn_attn"),
            "real_vocab": min(REAL_VOCAB, vocab),
        },
    }
    stored = dtype or config.get("torch_dtype") or config.get("dtype")
    return {**plain, "torch_dtype": stored} if stored else plain


def qwen2_generation_config(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json in the words of today's transformers.

    v1's own code stopped a chat by its ChatML ids; here they are among ``eos_token_id``.

    Args:
        generation: the v1 file's contents, ``{}`` where there is none.
        config: the Qwen2 config (see ``qwen2_config``).
    """
    sampling = {key: generation[key] for key in _SAMPLING_KEYS if generation.get(key) is not None}
    ids: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := config.get(key, generation.get(key))) is not None:
            ids[key] = value
    if config["vocab_size"] > IM_END and generation.get("chat_format") == "chatml":
        ids["eos_token_id"] = [IM_END, END_OF_TEXT]
    window = {key: generation[key] for key in ("max_window_size",) if key in generation}  # for ``chatml``
    return {**ids, **sampling, **window}


def _token_ids(config: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """<|endoftext|> three times, as Qwen2 has it; a small vocabulary without it keeps its own ids."""
    if vocab > END_OF_TEXT:
        return {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _get(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return _DEFAULTS[key] if value is None else value


def _count(config: Mapping[str, Any], key: str) -> int:
    """A size under its usual or its GPT-2 name; both present have to agree."""
    names = [name for name in (key, _KEYS[key]) if config.get(name) is not None]
    if not names:
        raise ModelError(
            f"config.json of this Qwen v1 model has neither {key} nor {_KEYS[key]}",
            where="config.json",
            hint="copy the model's config.json again",
        )
    value = config[names[0]]
    if config[names[-1]] != value:
        raise _contradiction(f"{names[0]} is {value}", f"{names[-1]} is {config[names[-1]]}")
    return _whole(names[0], value)


def _whole(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ModelError(
            f"config.json says {key} = {value!r}; it has to be a positive whole number",
            where="config.json",
            hint="copy the model's config.json again",
        )
    return value


def _heads(config: Mapping[str, Any], hidden: int) -> int:
    """Heads are hidden_size / kv_channels; a head count that says otherwise is an error."""
    channels = _whole("kv_channels", _get(config, "kv_channels"))
    if any(config.get(name) is not None for name in ("num_attention_heads", "n_head")):
        heads = _count(config, "num_attention_heads")
    else:
        heads = hidden // channels
    if heads * channels != hidden:
        raise _contradiction(
            f"num_attention_heads {heads} × kv_channels {channels} is {heads * channels}",
            f"hidden_size is {hidden}",
        )
    return heads


def _half(both: int) -> int:
    """v1 counts w1 and w2 together."""
    if both % 2:
        raise ModelError(
            f"intermediate_size of a Qwen v1 model counts w1 and w2 together, but {both} is odd",
            where="config.json",
            hint="copy the model's config.json again",
        )
    return both // 2


def _vocab(config: Mapping[str, Any]) -> int:
    """Rows of the embedding: the padded size where the first release names it."""
    for key in ("padded_vocab_size", "vocab_size"):
        if config.get(key) is not None:
            return _whole(key, config[key])
    raise ModelError(
        "config.json has neither vocab_size nor padded_vocab_size",
        where="config.json",
        hint="copy the model's config.json again",
    )


def _positions(config: Mapping[str, Any]) -> int:
    names = ("max_position_embeddings", "n_positions")
    if all(config.get(name) is None for name in names):
        return int(_get(config, "seq_length"))
    return _count(config, "max_position_embeddings")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = _get(config, key)
    if isinstance(value, bool):
        return value
    raise ModelError(
        f"config.json says {key} = {value!r}; it has to be true or false",
        where="config.json",
        hint="copy the model's config.json again",
    )


def _contradiction(one: str, other: str) -> ModelError:
    return ModelError(
        f"config.json contradicts itself: {one}, but {other}",
        where="config.json",
        hint="copy the model's config.json again, or correct the key that is wrong",
    )
