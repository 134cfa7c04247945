"""Read config.json and check it: known architectures, believable numbers, one way to rotate heads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.unsupported import NOT_SUPPORTED_YET, missing_by_config, recognise, refuse_prefix

SAME_DECODER = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
"""Types whose blocks are another type's: the three rows of positions are equal for text, so mrope is rope."""

_OF_THE_WHOLE = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
"""Keys that vision-language models have at the top of config.json, and that the language model needs."""


def is_nested(config: Mapping[str, Any]) -> bool:
    """Return whether config.json describes more than a language model: a vision-language model, say."""
    return isinstance(config.get("text_config"), dict)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the language model: config.json itself, or what lies under ``text_config``."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return dict(config)
    kind = nested.get("model_type", f"{config['model_type']}_text")
    shared = {key: config[key] for key in _OF_THE_WHOLE if key in config}
    found = {**nested, **shared, "model_type": SAME_DECODER.get(kind, kind)}
    if found["model_type"] != kind:
        for key in ("rope_parameters", "rope_scaling"):
            if isinstance(rope := found.get(key), dict):
                found[key] = {name: value for name, value in rope.items() if not name.startswith("mrope")}
    if kind == "qwen3_vl_moe_text":
        found["norm_topk_prob"] = True  # by its code, whatever the config says
    return found


def whole_config(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published config.json with what has changed in ``text``, which was its ``text_config``."""
    if not is_nested(config):
        return dict(text)
    before = text_config(config)
    changed = {key: value for key, value in text.items() if before.get(key) != value}
    top = {key: changed.pop(key) for key in _OF_THE_WHOLE if key in changed}
    return {**config, **top, "text_config": {**config["text_config"], **changed}}


DEFAULT_THETA = 10_000.0
"""The rotary base where config.json says none."""
_POSITIVE = {
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
}  # fmt: skip
_LARGEST = 2**31
"""Of a rope scaling."""
_COPY_AGAIN = "copy the model's config.json again"


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a Llama or Qwen model rotates its heads, in either spelling of config.json."""
    scaling, parameters = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    left_out = {"rope_theta": config.get("rope_theta") or DEFAULT_THETA}
    one, other = (
        {**left_out, **rope, "rope_type": kind_of(rope), "type": None} for rope in (scaling, parameters)
    )
    if scaling and parameters and one != other:
        raise ModelError(
            "rope_scaling and rope_parameters of config.json say different things",
            hint="keep one of them, with rope_theta in it; transformers 5 writes rope_parameters",
        )
    found = {**scaling, **parameters}
    if nested := sorted(name for name, value in found.items() if isinstance(value, dict)):
        raise ModelError(
            f"the rope parameters of config.json are those of kinds of layers ({', '.join(nested)}); a Llama "
            "or Qwen model has the same in all layers",
            hint=_COPY_AGAIN,
        )
    if kind_of(found) != "default":
        factor = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if config.get("model_type") not in HYBRIDS and factor not in (None, 1):
            raise ModelError(
                f"partial_rotary_factor {factor!r} of config.json: heads of a Llama or Qwen model are "
                "rotated whole",
                hint=_COPY_AGAIN,
            )
        _check_scaling(found)
    return found


def kind_of(rope: Mapping[str, Any]) -> Any:
    """Return the scaling's name, under either key; ``default``: there is none."""
    return rope.get("rope_type", rope.get("type", "default"))


def _check_scaling(rope: Mapping[str, Any]) -> None:
    for name in _POSITIVE & {name for name, value in rope.items() if value is not None}:
        value = rope[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise ModelError(
                f"the rope scaling of config.json has {name} {value!r}; it has to be a positive number up to "
                f"{_LARGEST}",
                hint=_COPY_AGAIN,
            )


KNOWN_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen": "QWenLMHeadModel",  # Qwen v1; seen as Qwen2
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",  # its language model is Qwen3
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",  # and that of this one is Qwen3-MoE
}
"""model_type → class name in config.json, of every architecture with a tested recipe."""


def by_inspection(config: Mapping[str, Any]) -> bool:
    """Return whether a model is none of ``KNOWN_ARCHITECTURES``: transformers' code alone describes it."""
    return config["model_type"] not in KNOWN_ARCHITECTURES


def class_in_transformers(model_type: str) -> str | None:
    """Return the name of transformers' causal language model of a type; None: it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return found if isinstance(found, str) and found.endswith(("ForCausalLM", "LMHeadModel")) else None


_HARMLESS_PRIVATE_KEYS = {"_name_or_path", "_model_name_or_path"}
_HARMLESS_PRIVATE_VALUES: dict[type, set[str]] = {
    int: {"_sliding_window_pattern"},  # of Gemma 3
    bool: {"_attn_implementation_autoset", "_load_in_4bit", "_load_in_8bit"},
}
"""What transformers itself has saved: flags by 4.46 to 4.50, and with bitsandbytes."""
_OTHER_USE = re.compile(r"\w+For(?!CausalLM$)\w+|\w+(?<!LMHead)Model")
"""Classes of transformers that are no causal language models."""


_Bound = tuple[int, int]
"""Smallest and largest believable value of a count in config.json."""
_LIMIT = 2**31 - 1
_COUNTS: dict[str, _Bound] = {
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 24),
    "num_hidden_layers": (1, 10_000),
    "num_attention_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "kv_channels": (1, 1 << 16),
    "vocab_size": (1, 1 << 26),
    "max_position_embeddings": (1, _LIMIT),
    "seq_length": (1, _LIMIT),
    "max_window_layers": (0, _LIMIT),
    "num_experts": (1, 1 << 16),
    "num_local_experts": (1, 1 << 16),  # what transformers 5 calls them
    "n_routed_experts": (1, 1 << 16),  # and what DeepSeek and GLM do
    "num_nextn_predict_layers": (0, 100),
    "num_experts_per_tok": (1, 1 << 16),
    "moe_intermediate_size": (1, 1 << 24),
    "shared_expert_intermediate_size": (0, 1 << 24),
    "decoder_sparse_step": (1, 10_000),
    "full_attention_interval": (1, 10_000),
    "linear_num_key_heads": (1, 1 << 16),
    "linear_num_value_heads": (1, 1 << 16),
    "linear_key_head_dim": (1, 1 << 16),
    "linear_value_head_dim": (1, 1 << 16),
    "linear_conv_kernel_dim": (1, 1 << 10),
    "num_labels": (0, 1 << 20),  # transformers makes a name for each
}
HYBRIDS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Types with linear attention in some layers, and an output gate and partly rotated heads in the others."""
PLAIN_ROPE = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Types whose heads are rotated whole, in the same way in all layers."""
LAYER_KINDS = ("full_attention", "sliding_attention", "linear_attention")
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size")
_POSITIVE_REALS = ("rms_norm_eps", "layer_norm_epsilon", "rope_theta", "rotary_emb_base")


def read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read and check config.json of a model folder; return it with notices for the user."""
    config = _load(folder)
    path = folder / "config.json"
    _refuse_private_keys(config, path)
    notices = check_architecture(config, path)
    text = text_config(config)
    check_numbers(text, path)
    if text["model_type"] in PLAIN_ROPE:
        try:
            rope_parameters(text)
        except ModelError as error:
            error.where = str(path)
            raise
    return config, notices


def _load(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise _no_model("config.json is missing", folder) from None
    except NotADirectoryError:
        raise _no_model("it is a file", folder) from None
    except OSError as error:
        raise ModelError(f"config.json cannot be read: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:
        raise _no_model(f"config.json is not JSON ({error})", folder) from error
    if not isinstance(config, dict):
        raise _no_model(f"config.json holds a {type(config).__name__}, not an object", folder)
    if not isinstance(config.get("model_type"), str):
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or "QWenLMHeadModel" not in architectures:
            raise _no_model("config.json names no model_type", folder)
        config["model_type"] = "qwen"
    return config


def require_layers(config: dict[str, Any], names: Iterable[str], folder: Path) -> None:
    """Check that the last layer of config.json has tensors, before ten thousand are built."""
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    names = list(names)
    if any(name.startswith(last.removeprefix("model.")) for name in names):
        raise UnsupportedError(
            "its tensors are called layers.0…, not model.layers.0…: a model without a language model's head, "
            "as embedding models are saved",
            where=folder,
            hint="name a causal language model",
        )
    if not any(name.startswith(last) for name in names):
        refuse_prefix(names, folder)
        raise ModelError(
            f"config.json says {config['num_hidden_layers']} layers, but the last one has no weights",
            where=folder,
            hint="config.json and the weights are from different models: copy the folder again",
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _no_model(why: str, folder: Path) -> ModelError:
    hint = f"name a folder with config.json and *.safetensors; this one holds {_listing(folder)}"
    why, hint = recognise(folder) or (why, hint)
    return ModelError(f"not a model folder: {why}", where=folder, hint=hint)


def _listing(folder: Path, most: int = 8) -> str:
    if not folder.is_dir():
        return "nothing, it is a file" if folder.exists() else "nothing, it does not exist"
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _keys(value: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (key, dotted path, value) of every object key in a JSON value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, f"{prefix}{key}", inner
            yield from _keys(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner, prefix)


def _refuse_private_keys(config: dict[str, Any], path: Path) -> None:
    """Refuse private keys: ``_attn_implementation_internal`` makes the loader fetch and run code."""
    for key, dotted, value in _keys(config):
        harmless = _HARMLESS_PRIVATE_KEYS | _HARMLESS_PRIVATE_VALUES.get(type(value), set())
        if key.startswith("_") and key not in harmless:
            raise ModelError(
                f"config.json holds the private key {dotted}, which could make a loader run foreign code",
                where=path,
                hint="do not trust this model; if it is yours, remove the key",
            )


def check_architecture(config: dict[str, Any], path: Path) -> list[str]:
    """Return notices about an architecture known here or to transformers; else raise ``UnsupportedError``."""
    model_type = config["model_type"]
    if model_type in KNOWN_ARCHITECTURES:
        _refuse_other_use(config, path)
        whole = "ForConditionalGeneration" in KNOWN_ARCHITECTURES[model_type]
        if whole and not is_nested(config):
            raise ModelError(
                f"config.json of a {model_type} has no text_config, which describes its language model",
                where=path,
                hint=_COPY_AGAIN,
            )
        if "auto_map" in config:
            return [f"auto_map in config.json is ignored: {model_type} is built in, and its code is not run"]
        return []
    supported = ", ".join(KNOWN_ARCHITECTURES)
    hint = f"supported model types: {supported}, and decoders that transformers has built in"
    missing = NOT_SUPPORTED_YET.get(model_type)
    parts = missing_by_config(config)
    if missing is None and parts is None and (built := class_in_transformers(model_type)):
        _refuse_other_use(config, path)
        return [
            f"{model_type} is none of the model types with a recipe here: its blocks are inspected as "
            f"transformers' {built} builds them, and --engine transformers runs it"
        ]
    if missing is not None:
        what = f"{model_type} is not supported yet: {missing} would have to be added"
    elif "auto_map" in config:
        what = f"{model_type} can only be loaded by its own remote code, which is never run here"
    elif parts is not None:
        what = f"{model_type} is not supported yet: {parts}, at least, would have to be added"
    else:
        what = f"the model type {model_type!r} is unknown here"
    raise UnsupportedError(what, where=path, hint=hint)


def _refuse_other_use(config: dict[str, Any], path: Path) -> None:
    """Refuse classifiers and reward models, whose blocks are those of a language model."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        return
    known = KNOWN_ARCHITECTURES.get(config["model_type"]) or class_in_transformers(config["model_type"])
    if all(isinstance(name, str) and name != known and _OTHER_USE.fullmatch(name) for name in classes):
        raise UnsupportedError(
            f"{', '.join(classes)} is not a causal language model",
            where=path,
            hint=f"name a model whose architectures are {known}",
        )


def check_labels(config: dict[str, Any], path: Path) -> None:
    """Refuse labels without end: transformers makes a name for each, also where it only loads a tokenizer."""
    labels = config.get("num_labels")
    if labels is not None and not _is_count(labels, _COUNTS["num_labels"]):
        raise _absurd("num_labels", labels, "a whole number up to a million", path)


def check_numbers(config: dict[str, Any], path: Path) -> None:
    """Refuse counts that no model has, and heads that do not divide; names key and value."""
    required = _REQUIRED if config["model_type"] != "qwen" else ()
    widths = (
        () if not required or any(config.get(key) is not None for key in _MLP_WIDTHS) else _MLP_WIDTHS[:1]
    )
    if missing := [key for key in (*required, *widths) if config.get(key) is None]:
        if by_inspection(config):
            raise UnsupportedError(
                f"config.json of a {config['model_type']} has no {missing[0]}, by which decoders are "
                "inspected",
                where=path,
                hint="this architecture is not supported yet",
            )
        raise ModelError(f"config.json has no {missing[0]}", where=path, hint=_COPY_AGAIN)
    for key, bound in _COUNTS.items():
        if (value := config.get(key)) is not None and not _is_count(value, bound):
            raise _absurd(key, value, f"a whole number from {bound[0]} to {bound[1]}", path)
    for key in _POSITIVE_REALS:
        value = config.get(key)
        if value is not None and not _is_positive(value):
            raise _absurd(key, value, "a positive number", path)
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise _absurd("tie_word_embeddings", config["tie_word_embeddings"], "true or false", path)
    _check_nested(config, path)
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if hidden is not None and heads is not None:
        if config.get("head_dim") is None and config.get("kv_lora_rank") is None and hidden % heads:
            raise _absurd("hidden_size", hidden, f"a multiple of num_attention_heads ({heads})", path)
        shared = config.get("num_key_value_heads")
        if shared is not None and heads % shared:
            raise _absurd("num_key_value_heads", shared, f"a divisor of num_attention_heads ({heads})", path)
    keys, values = config.get("linear_num_key_heads"), config.get("linear_num_value_heads")
    if keys is not None and values is not None and values % keys:
        raise _absurd("linear_num_value_heads", values, f"a multiple of linear_num_key_heads ({keys})", path)
    named = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[key] for key in named if config.get(key)), None)
    chosen = "num_experts_per_tok"
    if experts is not None and (config.get(chosen) or 0) > experts:
        raise _absurd(chosen, config[chosen], f"at most the number of experts ({experts})", path)


def _check_nested(config: dict[str, Any], path: Path) -> None:
    for key in ("quantization_config", "rope_scaling", "rope_parameters", "qwen_v1"):
        if not isinstance(config.get(key) or {}, dict):
            raise _absurd(key, config[key], "an object", path)
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise _absurd("layer_types", kinds, "a list of names", path)
    layers = config.get("num_hidden_layers")
    if kinds is not None and layers is not None and len(kinds) != layers:
        raise ModelError(
            f"config.json says num_hidden_layers = {layers}, but its layer_types name {len(kinds)} layers",
            where=path,
            hint="make both agree with the layers in the weights: a model whose layers were removed needs a "
            "shorter layer_types",
        )
    unknown = sorted(set(kinds or ()) - set(LAYER_KINDS))
    if unknown:
        raise UnsupportedError(
            f"layer_types of config.json names {', '.join(unknown)}, which is not known here",
            where=path,
            hint=f"known are {', '.join(LAYER_KINDS)}",
        )
    model_type = config.get("model_type")
    foreign = "sliding_attention" if model_type in HYBRIDS else "linear_attention"
    if foreign in (kinds or ()) and model_type in (*HYBRIDS, *PLAIN_ROPE):
        raise ModelError(
            f"layer_types of config.json names {foreign}, which no layer of a {model_type} has",
            where=path,
            hint=_COPY_AGAIN,
        )

    for rope in (config.get("rope_scaling"), config.get("rope_parameters")):
        for key in ("rope_theta", "factor"):
            value = rope.get(key) if rope else None
            if value is not None and not _is_positive(value):
                raise _absurd(key, value, "a positive number", path)
    real = (config.get("qwen_v1") or {}).get("real_vocab")
    if real is not None and not _is_count(real, _COUNTS["vocab_size"]):
        raise _absurd("qwen_v1.real_vocab", real, "a positive whole number", path)
    if config.get("use_sliding_window") and config.get("sliding_window") == 0:
        raise _absurd("sliding_window", 0, "1 or more where use_sliding_window is set", path)


def _is_count(value: Any, bound: _Bound) -> bool:
    return type(value) is int and bound[0] <= value <= bound[1]  # `type is`: True is no count


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def _absurd(key: str, value: Any, expected: str, path: Path) -> ModelError:
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "…"
    what = f"config.json says {key} = {shown}; it has to be {expected}"
    return ModelError(what, where=path, hint=_COPY_AGAIN)
