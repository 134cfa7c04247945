"""Show Qwen v1 checkpoints (``QWenLMHeadModel``) as Qwen2, without their remote code.

Up to ``seq_length`` tokens v1 *is* a Qwen2 without grouped heads: the fused ``c_attn`` holds q, k and v as
three blocks of rows, ``w2`` is the gate and ``w1`` the up projection. Beyond, v1's long-context flags matter,
which the Qwen2 config keeps under ``qwen_v1``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.models.gptq_config import LAYER_PARTS, QuantConfig, settings_of
from qwenq.models.source import Part, PartsView, TensorSource, require_tensors

# Translate config.json and generation_config.json of Qwen v1 to Qwen2's.
#
# Two key sets were published: the first release (August 2023) used GPT-2's names, all later ones the usual
# names. Both are read; where a file has both, they have to agree.


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
    """Translate a Qwen v1 config, in either key set, to Qwen2.

    Below ``seq_length`` tokens it is the very same model. ``dtype`` of the weights becomes
    ``torch_dtype``; None: what config.json says.
    """

    def wrong(what: str) -> ModelError:
        hint = "copy the model's config.json again, or correct the key that is wrong"
        return ModelError(what, where=where, hint=hint)

    keys = _usual_keys(config, wrong)
    plain = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": keys["hidden_size"],
        "intermediate_size": keys["intermediate_size"] // 2,
        "num_hidden_layers": keys["num_hidden_layers"],
        "num_attention_heads": keys["num_attention_heads"],
        "num_key_value_heads": keys["num_attention_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": keys["max_position_embeddings"],
        "rms_norm_eps": keys["layer_norm_epsilon"],
        "rope_theta": float(keys["rotary_emb_base"]),
        "vocab_size": keys["vocab_size"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": keys["initializer_range"],
        "use_cache": True,
        **_token_ids(config, keys["vocab_size"]),
        V1_KEY: {
            "seq_length": keys["seq_length"],
            "use_dynamic_ntk": keys["use_dynamic_ntk"],
            "use_logn_attn": keys["use_logn_attn"],
            "real_vocab": min(REAL_VOCAB, keys["vocab_size"]),
        },
    }
    stored = dtype or config.get("torch_dtype") or config.get("dtype")
    return {**plain, "torch_dtype": stored} if stored else plain


def qwen2_generation_config(generation: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate v1's generation_config.json to the keys of today's transformers; ``config`` is Qwen2's.

    v1's own code stopped a chat by its ChatML ids; here they are among ``eos_token_id``.
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


def _usual_keys(config: Mapping[str, Any], wrong: Callable[[str], ModelError]) -> dict[str, Any]:
    """Return a v1 config under the usual names, sizes checked, with QWenConfig's defaults."""
    found = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    found["vocab_size"] = found.get("padded_vocab_size", found.get("vocab_size"))
    if found["vocab_size"] is None:
        raise wrong("config.json has neither vocab_size nor padded_vocab_size")
    for key, old in _KEYS.items():
        if old in found and found.setdefault(key, found[old]) != found[old]:
            raise wrong(f"config.json contradicts itself: {key} is {found[key]}, but {old} is {found[old]}")
    found.setdefault("max_position_embeddings", found["seq_length"])
    if type(found["kv_channels"]) is int and found["kv_channels"] and type(found.get("hidden_size")) is int:
        found.setdefault("num_attention_heads", found["hidden_size"] // found["kv_channels"])
    for key in ("kv_channels", "vocab_size", *_KEYS):
        value = found.get(key)
        if value is None:
            raise wrong(f"config.json of this Qwen v1 model has neither {key} nor {_KEYS[key]}")
        if type(value) is not int or value < 1:
            raise wrong(f"config.json says {key} = {value!r}; it has to be a positive whole number")
    heads, channels, hidden = (found[key] for key in ("num_attention_heads", "kv_channels", "hidden_size"))
    if heads * channels != hidden:
        raise wrong(
            f"config.json contradicts itself: num_attention_heads {heads} × kv_channels {channels} is "
            f"{heads * channels}, but hidden_size is {hidden}"
        )
    if found["intermediate_size"] % 2:
        both = found["intermediate_size"]
        raise wrong(f"intermediate_size of a Qwen v1 model counts w1 and w2 together, but {both} is odd")
    for key in ("use_dynamic_ntk", "use_logn_attn"):
        if not isinstance(found[key], bool):
            raise wrong(f"config.json says {key} = {found[key]!r}; it has to be true or false")
    return found


# Limit sequences to what is computed right: Qwen v1 changes its attention beyond ``seq_length``.
#
# Dynamic NTK and logn are in ``qwenq.runtime``'s decoder alone. transformers' Qwen2 blocks, which
# quantising, checking and writing calibration text run, would go on with plain RoPE and say nothing.


@dataclass(frozen=True)
class LongContext:
    """How Qwen v1 goes beyond the length that it was trained on."""

    seq_length: int  # tokens up to which the model is a plain Qwen2
    dynamic_ntk: bool  # stretch the rotary base by the prompt's length
    logn: bool  # scale queries by ``log(position + 1) / log(seq_length)`` beyond ``seq_length``


def long_context_of(config: Mapping[str, Any], where: str | Path = "config.json") -> LongContext | None:
    """Return Qwen v1's long-context flags, as the Qwen2 view of its config keeps them.

    ``open_checkpoint`` calls it, so that whatever it has opened has sound flags or none.
    """
    flags = config.get(V1_KEY)
    if flags is None:
        return None
    try:
        return LongContext(
            seq_length=int(flags["seq_length"]),
            dynamic_ntk=bool(flags["use_dynamic_ntk"]),
            logn=bool(flags["use_logn_attn"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{V1_KEY} in config.json is not as `qwenq convert` writes it: {error}",
            where=where,
            hint="convert the Qwen v1 model again",
        ) from error


def longest_plain(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that transformers' blocks compute as this model does; None: no limit.

    That is ``max_position_embeddings``; of a Qwen v1 model whose flags are on, at most ``seq_length``.
    """
    limits = [config.get("max_position_embeddings"), _stretched_from(config)]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def require_plain(config: Mapping[str, Any], tokens: int, *, option: str, where: str | Path) -> None:
    """Refuse sequences longer than ``longest_plain``; ``option``, or a file, made them so long."""
    longest = longest_plain(config)
    if longest is None or tokens <= longest:
        return
    why = f"the model takes {longest}"
    if longest == _stretched_from(config):
        why = (
            f"beyond {longest} this Qwen v1 model changes its attention (dynamic NTK, logn), "
            "which quantising and checking do not do"
        )
    raise UsageError(f"{option} is {tokens} tokens, but {why}", where=where, hint=f"give at most {longest}")


def _stretched_from(config: Mapping[str, Any]) -> int | None:
    """Return the tokens beyond which v1 is no plain Qwen2; None: it always is one."""
    context = long_context_of(config)
    return context.seq_length if context is not None and (context.dynamic_ntk or context.logn) else None


_TOP = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
_IN_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_FUSED = "attn.c_attn"
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BUFFERS = (".attn.rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # rebuilt, never learnt
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)\.(\w+)")
_OUTPUT_AXIS = {"weight": 0, "bias": 0, "qweight": 1, "scales": 1, "qzeros": 1}


def qwen2_view(
    folder: Path, config: Mapping[str, Any], source: TensorSource
) -> tuple[dict[str, Any], QwenV1Source]:
    """Show a v1 folder, its config.json and its tensors as Qwen2's: full precision or GPTQ."""
    quant = settings_of(folder, config, source.names())
    names = set(source.names())
    embedding = "transformer.wte.weight"
    dtype = str(source.info(embedding).dtype).removeprefix("torch.") if embedding in names else None
    plain = qwen2_config(config, dtype, folder / "config.json")
    if quant is not None:
        plain["quantization_config"] = quant.to_config_json()
    return plain, QwenV1Source(source, plain, quant)


class QwenV1Source(PartsView):
    """The tensors of a Qwen v1 checkpoint under Qwen2's names; one v1 tensor is in memory at a time.

    All-zero biases that AutoGPTQ wrote beside v1's bias-free linears are dropped. ``config`` is the Qwen2
    config that belongs to the tensors (see ``qwen2_config``). q, k and v stand where c_attn stood.
    """

    def __init__(self, source: TensorSource, config: Mapping[str, Any], quant: QuantConfig | None) -> None:
        super().__init__(source, {})
        require_tensors(source, dict(_expected(config, quant)), self.files[0].parent if self.files else None)
        if quant is not None:
            _refuse_activation_order(source, quant)
        self._parts = dict(_mapping(source, config["num_hidden_layers"]))


def _mapping(source: TensorSource, layers: int) -> Iterator[tuple[str, Part]]:
    """Yield every tensor by its Qwen2 name, in file order."""
    for name in source.names():
        if name.endswith(_BUFFERS):
            continue
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            yield f"{_TOP[module]}.{kind}", Part(name)
            continue
        found = _BLOCK.fullmatch(name)
        if found is None or int(found[1]) >= layers:
            raise _unknown(name)
        prefix = f"model.layers.{found[1]}"
        if found[2] == _FUSED and kind in (*_OUTPUT_AXIS, "g_idx"):
            for part, module in enumerate(_SPLIT):  # g_idx runs along the input axis: all three share it
                own = Part(name)
                if kind != "g_idx":
                    own = Part(name, axis=_OUTPUT_AXIS[kind], part=part, parts=len(_SPLIT))
                yield f"{prefix}.{module}.{kind}", own
        elif found[2] not in _IN_BLOCK:
            raise _unknown(name)
        elif kind != "bias":
            yield f"{prefix}.{_IN_BLOCK[found[2]]}.{kind}", Part(name)
        elif bool(source.read(name).any()):
            raise ModelError(
                "a Qwen v1 model has no bias but c_attn's, yet this one is not zero",
                where=name,
                hint="the model was changed; Qwen2's layout has no place for this bias",
            )


def _unknown(name: str) -> ModelError:
    if ".visual." in name or ".audio." in name:
        return UnsupportedError(
            "this is a multimodal Qwen v1 model: only the language models are supported",
            where=name,
            hint="use Qwen-1.8B, 7B, 14B or 72B, base or Chat",
        )
    return ModelError(
        "a tensor that this Qwen v1 model does not have", where=name, hint="is config.json another model's?"
    )


def _expected(config: Mapping[str, Any], quant: QuantConfig | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (v1 name, shape) of the tensors that cannot be missing."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "transformer.wte.weight", (vocab, hidden)
    yield "transformer.ln_f.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
    sizes = {  # (out, in)
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (inner, hidden),
        "mlp.w2": (inner, hidden),
        "mlp.c_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        yield f"{block}.ln_1.weight", (hidden,)
        yield f"{block}.ln_2.weight", (hidden,)
        yield f"{block}.{_FUSED}.bias", (3 * hidden,)
        for module, size in sizes.items():
            if quant is None:
                yield f"{block}.{module}.weight", size
            else:
                shapes = quant.packed_shapes(*size)
                yield from ((f"{block}.{module}.{part}", shapes[part]) for part in LAYER_PARTS[:3])


def _refuse_activation_order(source: TensorSource, quant: QuantConfig) -> None:
    """Refuse activation order: no released v1 model has it, and nothing here was tested on one."""
    from qwenq.models.gptq_format import has_trivial_g_idx

    for name in source.names():
        if not name.endswith(".g_idx"):
            continue
        g_idx = source.read(name)
        if not has_trivial_g_idx(g_idx, quant.groups(g_idx.shape[0])):
            raise UnsupportedError(
                "this quantised Qwen v1 model is in activation order: its g_idx is not trivial",
                where=name,
                hint="quantise the full-precision model again; act-order here keeps the natural order",
            )
