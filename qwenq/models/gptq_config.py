"""Read and write the settings of a GPTQ checkpoint as its JSON files hold them.

Keys of ``quantization_config`` (config.json) and ``quantize_config.json``, in all published variants:
AutoGPTQ's nine keys (Qwen v1 and later), transformers' and optimum's (Qwen2.5), GPTQModel's (Qwen3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, cast, get_args

from qwenq.errors import ModelError, UnsupportedError

LAYER_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Tensors of a quantised linear."""

# Say which modules of a checkpoint are quantised, and how: ``dynamic`` and its like.
#
# ``dynamic`` maps patterns to settings: the first pattern that matches a module's whole name from its start
# counts; ``-:`` says that the module is not quantised, anything else that these settings take the place of
# the common ones. GPTQModel matches names as they are in the files, vLLM and SGLang those of their own
# modules, in which q, k and v (gate and up, …) are one. So every rule is written with ``.*`` in front, and
# under both names.


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Modules of vLLM and SGLang, and those of the files that are one in them."""
EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+$")
"""A linear of an expert; the first group is the module that holds all experts of a block."""
NESTED = "model.language_model."


def rule_for(dynamic: Mapping[str, Mapping[str, Any]], module: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return the first rule for a module, its pattern and its settings; None: no rule matches.

    ``module`` is its name in the language model; in the files of a vision-language model it may be nested.
    """
    names = [module]
    if module.startswith("model.") and not module.startswith(NESTED):
        names.append(NESTED + module.removeprefix("model."))
    for pattern, settings in dynamic.items():
        expression = pattern.removeprefix("-:").removeprefix("+:")
        if any(re.match(expression, name) for name in names):
            return pattern, settings
    return None


def dynamic_rules(
    kept: Iterable[str],
    bits: Mapping[str, int],
    common: int,
    settings: Mapping[str, Any],
    beside: Iterable[str],
    block_bits: Iterable[tuple[str, int]] = (),
) -> dict[str, dict[str, Any]]:
    """Return a complete ``dynamic``: what is not quantised first, then what has bits of its own.

    Args:
        kept: names within a block of the modules that are not quantised.
        bits: of each linear that is, by its name within a block.
        common: the bits of all others.
        settings: what a rule has to repeat beside its bits: group size, symmetry, order.
        beside: what lies beside the language model: ``mtp``, ``visual``.
        block_bits: (full name, bits) of modules that differ from those of the same name in other blocks.
    """
    rules: dict[str, dict[str, Any]] = {f"-:.*{name}.*": {} for name in (*beside, "embed_tokens")}
    rules |= {f"-:{pattern}": {} for pattern in patterns(kept, bits)}
    rules |= block_rules(block_bits, settings)
    for width in sorted(set(bits.values()) - {common}):
        own = [name for name, other in bits.items() if other == width]
        for pattern in patterns(own, {name: other for name, other in bits.items() if other != width}):
            rules[f"+:{pattern}"] = {"bits": width, **settings}
    return rules


def block_rules(
    block_bits: Iterable[tuple[str, int]], settings: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return rules for modules whose bits differ from those of the same name in other blocks.

    ``block_bits`` are (full name, bits) of whole layers of the engines.
    """
    members: dict[tuple[int, str, str], list[str]] = {}
    for name, bits in block_bits:
        layer, _, module = name.partition("layers.")[2].partition(".")
        members.setdefault((bits, engine_layer(module), layer), []).append(module)
    layers: dict[tuple[int, str], list[str]] = {}
    for (bits, *_, layer), modules in members.items():
        (pattern,) = patterns(modules, ())
        layers.setdefault((bits, pattern.removeprefix(r".*\.")), []).append(layer)
    return {
        rf"+:.*\.layers\.({'|'.join(found)})\.{pattern}": {"bits": bits, **settings}
        for (bits, pattern), found in layers.items()
    }


def patterns(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return patterns that match these modules in any block, and none of the others."""
    leaves: dict[str, list[str]] = {}
    experts = set()
    for module in modules:
        if (expert := EXPERT.fullmatch(module)) is not None:
            experts.add(expert[1])
            continue
        parent, _, leaf = module.rpartition(".")
        leaves.setdefault(parent, []).append(leaf)
    taken = set(others)
    found = [rf".*\.{re.escape(parent)}(\..*)?$" for parent in sorted(experts)]
    for parent, own in leaves.items():
        names = list(dict.fromkeys(own))
        for fused, parts in FUSED.items():
            mixed = any(f"{parent}.{part}" in taken for part in parts)
            if not mixed and any(part in names for part in parts):
                names.append(fused)
        inner = re.escape(names[0]) if len(names) == 1 else f"({'|'.join(map(re.escape, names))})"
        found.append(rf".*\.{re.escape(parent)}\.{inner}$" if parent else rf".*\.{inner}$")
    return found


def engine_layer(module: str) -> str:
    """Return the layer of an engine that a module within a block is part of, by name within the block.

    Modules of one layer have to be quantised alike: q, k and v, gate and up, all experts of a block.
    """
    if (expert := EXPERT.fullmatch(module)) is not None:
        return expert[1]
    parent, _, leaf = module.rpartition(".")
    fused = next((whole for whole, parts in FUSED.items() if leaf in parts), leaf)
    return f"{parent}.{fused}" if parent else fused


def module_groups(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Return ``modules_in_block_to_quantize``: names within a block, those that share an input together.

    vLLM looks for these names in those of its modules; it has one for all experts of a block.
    """
    found: list[list[str]] = []
    for group in groups:
        names = list(dict.fromkeys(m[1] if (m := EXPERT.fullmatch(name)) else name for name in group))
        if names not in found:
            found.append(names)
    return found


SUPPORTED_BITS = (2, 3, 4, 8)
CheckpointFormat = Literal["gptq", "gptq_v2"]
CHECKPOINT_FORMATS = get_args(CheckpointFormat)
_MOST_RULES, _LONGEST_RULE = 10_000, 1000  # of dynamic, and characters of one
_WIDEST = 1 << 24  # input columns of the widest linear that config.json may name


@dataclass(frozen=True)
class QuantConfig:
    """Settings of a quantised checkpoint."""

    bits: int = 4  # one of SUPPORTED_BITS
    group_size: int = 128  # input columns that share a scale; -1 for all of them
    sym: bool = True  # whether every zero point is ``2 ** (bits - 1)``
    # whether the *file* is in activation order (``g_idx`` not trivial). Act-order with static groups leaves
    # the natural order: false
    desc_act: bool = False
    static_groups: bool = False  # whether scales were fixed before the columns were reordered
    true_sequential: bool = True  # whether modules of a block were quantised in the order in which they run
    damp_percent: float = 0.01  # share of the Hessian's mean diagonal that was added to it; between 0 and 1
    # ``gptq`` stores zero points minus one, ``gptq_v2`` as they are
    checkpoint_format: CheckpointFormat = "gptq"
    lm_head: bool = False  # whether the head is quantised too
    # rules for modules that are not quantised, or otherwise than the rest
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # ``modules_in_block_to_quantize``: names within a block; empty: the file does not say
    modules: tuple[tuple[str, ...], ...] = ()

    def of(self, module: str) -> QuantConfig:
        """Return the settings of one quantised module, in which no rules are left."""
        if not self.dynamic:
            return self
        found = rule_for(self.dynamic, module)
        plain = replace(self, dynamic={})
        if found is None:
            return plain
        pattern, settings = found
        if pattern.startswith("-:"):
            raise ModelError(
                f"the rule {_shown(pattern)} of dynamic says that this module is not quantised, but it is",
                where=module,
                hint="config.json and the weights are not of one model: copy the folder again",
            )
        return replace(
            plain,
            bits=_bits(settings.get("bits", self.bits)),
            group_size=_group_size(settings.get("group_size", self.group_size)),
            sym=_flag(settings, "sym", self.sym),
            desc_act=_flag(settings, "desc_act", self.desc_act),
        )

    def groups(self, in_features: int) -> int:
        """Return number of groups along an input axis of that width."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def packed_shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of ``LAYER_PARTS`` for a weight [rows, columns] = [out, in]."""
        groups = self.groups(columns)
        return {
            "qweight": (columns * self.bits // 32, rows),
            "qzeros": (groups, rows * self.bits // 32),
            "scales": (groups, rows),
            "g_idx": (columns,),
        }

    def to_quantize_config_json(self) -> dict[str, Any]:
        """Return the contents of ``quantize_config.json``: AutoGPTQ's nine keys, and those of its 0.7."""
        found: dict[str, Any] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": self.damp_percent,
            "desc_act": self.desc_act,
            "static_groups": self.static_groups,
            "sym": self.sym,
            "true_sequential": self.true_sequential,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
        }
        if self.dynamic:
            found["dynamic"] = {key: dict(value) for key, value in self.dynamic.items()}
        return found

    def to_config_json(self) -> dict[str, Any]:
        """Return ``quantization_config`` as transformers, optimum, GPTQModel and vLLM read it."""
        found = {**self.to_quantize_config_json(), "lm_head": self.lm_head, "pack_dtype": "int32"}
        if self.modules:
            found["modules_in_block_to_quantize"] = [list(group) for group in self.modules]
        return found

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str | Path = "config.json") -> QuantConfig:
        """Read a whole config.json, or the contents of quantize_config.json; ``where`` is for messages."""
        keys = config.get("quantization_config", config)
        if not isinstance(keys, Mapping) or "bits" not in keys:
            _refuse_foreign_method(keys if isinstance(keys, Mapping) else {})
            raise ModelError(
                "the config names no GPTQ settings: quantization_config.bits is missing",
                where=where,
                hint="is this a quantised model? Its config.json needs a quantization_config",
            )
        _refuse_foreign_method(keys)
        return cls(
            bits=_bits(keys["bits"]),
            group_size=_group_size(keys.get("group_size", 128)),
            sym=_flag(keys, "sym", True),
            desc_act=_flag(keys, "desc_act", False),
            static_groups=_flag(keys, "static_groups", False),
            true_sequential=_flag(keys, "true_sequential", True),
            damp_percent=_damp_percent(keys.get("damp_percent")),
            checkpoint_format=_checkpoint_format(keys),
            lm_head=_flag(keys, "lm_head", False),
            dynamic=_dynamic(keys.get("dynamic")),
            modules=_modules(keys.get("modules_in_block_to_quantize")),
        )


def packed_bytes(rows: int, columns: int, bits: int, group_size: int) -> int:
    """Return the bytes of a packed weight [rows, columns]: words of int32, scales of float16."""
    shapes = QuantConfig(bits, group_size).packed_shapes(rows, columns)
    return sum(prod(shape) * (2 if part == "scales" else 4) for part, shape in shapes.items())


def settings_of(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> QuantConfig | None:
    """Return the GPTQ settings of a folder, from either of its JSON files; None: plain weights."""
    if config.get("quantization_config"):
        return QuantConfig.read(config, folder / "config.json")
    if not any(name.endswith(".qweight") for name in names):
        return None
    path = folder / "quantize_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("not an object")
        return QuantConfig.read(settings, path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            "the weights are quantised, but neither config.json nor quantize_config.json says how",
            where=path,
            hint="copy the model's quantize_config.json into the folder",
        ) from error


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a quantised model, by whatever method."""
    return bool(config.get("quantization_config"))


def _refuse_foreign_method(keys: Mapping[str, Any]) -> None:
    method = keys.get("quant_method", "gptq")
    if str(method).lower() != "gptq":
        raise UnsupportedError(
            f"the model is quantised with {_shown(method)}, not with GPTQ",
            where="quantization_config.quant_method",
            hint="start from a full-precision or a GPTQ checkpoint",
        )
    if keys.get("pack_dtype") and keys["pack_dtype"] != "int32":
        raise UnsupportedError(
            f"quantization_config.pack_dtype is {_shown(keys['pack_dtype'])}; only int32 is read",
            where="quantization_config.pack_dtype",
            hint="quantise the full-precision model again",
        )


def _dynamic(value: Any) -> dict[str, dict[str, Any]]:
    """Check rules by pattern: patterns that compile, settings that make sense."""
    if not value:
        return {}
    if not isinstance(value, Mapping) or len(value) > _MOST_RULES:
        raise _wrong(f"dynamic is {_shown(value)}; it has to be an object of rules", "dynamic")
    for pattern, settings in value.items():
        if not isinstance(settings, Mapping):
            raise _wrong(f"the rule {_shown(pattern)} of dynamic is {_shown(settings)}, no object", "dynamic")
        try:
            if len(pattern) > _LONGEST_RULE:
                raise ValueError("too long")
            re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            what = f"the rule {_shown(pattern)} of dynamic is not a pattern: {error}"
            raise _wrong(what, "dynamic") from error
        if "bits" in settings:
            _bits(settings["bits"])
        if "group_size" in settings:
            _group_size(settings["group_size"])
        for key in ("sym", "desc_act"):
            _flag(settings, key, False)
    return {pattern: dict(settings) for pattern, settings in value.items()}


def _modules(value: Any) -> tuple[tuple[str, ...], ...]:
    """Return groups of names; a flat list is one group."""
    if not value:
        return ()
    groups = value if isinstance(value, list) else [value]
    groups = [group if isinstance(group, list) else [group] for group in groups]
    if not all(isinstance(name, str) for group in groups for name in group):
        key = "modules_in_block_to_quantize"
        raise _wrong(f"{key} is {_shown(value)}, no list of names", key)
    return tuple(tuple(group) for group in groups)


def _wrong(what: str, key: str) -> ModelError:
    hint = "restore config.json from where the model came from"
    return ModelError(what, where=f"quantization_config.{key}", hint=hint)


def _checkpoint_format(keys: Mapping[str, Any]) -> CheckpointFormat:
    """Read ``checkpoint_format`` (AutoGPTQ, GPTQModel) or ``format`` (newer GPTQModel); absent: v1."""
    value = keys.get("checkpoint_format") or keys.get("format") or "gptq"
    if value not in CHECKPOINT_FORMATS:
        raise UnsupportedError(
            f"checkpoint_format {_shown(value)} is not read here",
            where="quantization_config.checkpoint_format",
            hint=f"convert it to one of {', '.join(CHECKPOINT_FORMATS)} with the tool that wrote it",
        )
    return cast("CheckpointFormat", value)


def _bits(value: Any) -> int:
    if value in SUPPORTED_BITS and not isinstance(value, bool):
        return int(value)
    raise UnsupportedError(
        f"bits is {_shown(value)}; only {', '.join(map(str, SUPPORTED_BITS))} are read here",
        where="quantization_config.bits",
        hint="quantise the full-precision model with --bits 4 or --bits 8",
    )


def _group_size(value: Any) -> int:
    if type(value) is int and (value == -1 or 0 < value <= _WIDEST):
        return value
    raise _wrong(f"group_size is {_shown(value)}; it has to be -1 or a positive number", "group_size")


def _damp_percent(value: Any) -> float:
    """Read the damping, which is only shown: absent in some files, and null in others."""
    if value is None:
        return 0.01
    if type(value) in (int, float) and 0 <= value <= 1:
        return float(value) or 0.01
    raise _wrong(f"damp_percent is {_shown(value)}; it has to be a share between 0 and 1", "damp_percent")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _flag(keys: Mapping[str, Any], key: str, default: bool) -> bool:
    value = keys.get(key, default)
    if isinstance(value, bool):
        return value
    raise _wrong(f"{key} is {_shown(value)}; it has to be true or false", key)
