"""Translate config.json and generation_config.json of Qwen v1 to Qwen2's.

Two key sets were published: the first release (August 2023) used GPT-2's names, all later ones the usual
names. Both are read; where a file has both, they have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenq.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

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


def qwen2_config(
    config: Mapping[str, Any], dtype: str | None = None, where: str | Path = "config.json"
) -> dict[str, Any]:
    """Translate a Qwen v1 config to Qwen2; below ``seq_length`` tokens it is the very same model.

    Args:
        config: config.json of a v1 model, in either key set. It is not changed.
        dtype: of the weights, for ``torch_dtype``; None: what config.json says.
        where: the file, for messages.
    """
    keys = _Keys(config, where)
    hidden, vocab = keys.count("hidden_size"), keys.vocab()
    heads = keys.heads(hidden)
    plain = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": keys.half("intermediate_size"),
        "num_hidden_layers": keys.count("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": keys.positions(),
        "rms_norm_eps": keys.get("layer_norm_epsilon"),
        "rope_theta": float(keys.get("rotary_emb_base")),
        "vocab_size": vocab,
        "tie_word_embeddings": keys.get("tie_word_embeddings"),
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": keys.get("initializer_range"),
        "use_cache": True,
        **_token_ids(config, vocab),
        V1_KEY: {
            "seq_length": keys.get("seq_length"),
            "use_dynamic_ntk": keys.flag("use_dynamic_ntk"),
            "use_logn_attn": keys.flag("use_logn_attn"),
            "real_vocab": min(REAL_VOCAB, vocab),
        },
    }
    stored = dtype or config.get("torch_dtype") or config.get("dtype")
    return {**plain, "torch_dtype": stored} if stored else plain


def qwen2_generation_config(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate generation_config.json to the keys of today's transformers.

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
    """Return <|endoftext|> for all three, as Qwen2 has it; a small vocabulary keeps its own ids."""
    if vocab > END_OF_TEXT:
        return {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


@dataclass(frozen=True)
class _Keys:
    """Values of a v1 config.json, read key by key; errors name the file."""

    config: Mapping[str, Any]
    where: str | Path

    def get(self, key: str) -> Any:
        """Return the value, or QWenConfig's default."""
        value = self.config.get(key)
        return _DEFAULTS[key] if value is None else value

    def count(self, key: str) -> int:
        """Read a size under its usual or its GPT-2 name; both present have to agree."""
        names = [name for name in (key, _KEYS[key]) if self.config.get(name) is not None]
        if not names:
            raise self._wrong(f"config.json of this Qwen v1 model has neither {key} nor {_KEYS[key]}")
        value = self.config[names[0]]
        if self.config[names[-1]] != value:
            raise self._contradiction(f"{names[0]} is {value}", f"{names[-1]} is {self.config[names[-1]]}")
        return self._whole(names[0], value)

    def heads(self, hidden: int) -> int:
        """Compute the heads, hidden_size / kv_channels; a head count that differs is an error."""
        channels = self._whole("kv_channels", self.get("kv_channels"))
        if any(self.config.get(name) is not None for name in ("num_attention_heads", "n_head")):
            heads = self.count("num_attention_heads")
        else:
            heads = hidden // channels
        if heads * channels != hidden:
            raise self._contradiction(
                f"num_attention_heads {heads} × kv_channels {channels} is {heads * channels}",
                f"hidden_size is {hidden}",
            )
        return heads

    def half(self, key: str) -> int:
        """Halve a width: v1 counts w1 and w2 together."""
        both = self.count(key)
        if both % 2:
            raise self._wrong(f"{key} of a Qwen v1 model counts w1 and w2 together, but {both} is odd")
        return both // 2

    def vocab(self) -> int:
        """Return the rows of the embedding: the padded size where the first release names it."""
        for key in ("padded_vocab_size", "vocab_size"):
            if self.config.get(key) is not None:
                return self._whole(key, self.config[key])
        raise self._wrong("config.json has neither vocab_size nor padded_vocab_size")

    def positions(self) -> int:
        """Return the longest sequence; ``seq_length`` where nothing names it."""
        names = ("max_position_embeddings", "n_positions")
        if all(self.config.get(name) is None for name in names):
            return int(self.get("seq_length"))
        return self.count("max_position_embeddings")

    def flag(self, key: str) -> bool:
        """Read true or false."""
        value = self.get(key)
        if isinstance(value, bool):
            return value
        raise self._wrong(f"config.json says {key} = {value!r}; it has to be true or false")

    def _whole(self, key: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._wrong(f"config.json says {key} = {value!r}; it has to be a positive whole number")
        return value

    def _contradiction(self, one: str, other: str) -> ModelError:
        return self._wrong(
            f"config.json contradicts itself: {one}, but {other}", ", or correct the key that is wrong"
        )

    def _wrong(self, what: str, or_else: str = "") -> ModelError:
        return ModelError(what, where=self.where, hint=f"copy the model's config.json again{or_else}")
