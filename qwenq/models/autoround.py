"""Read the settings of an AutoRound checkpoint as those of the GPTQ or AWQ layout that its tensors have.

``packing_format`` names the layout: ``auto_round:auto_gptq`` is GPTQ's with zero points minus one,
``auto_round:gptqmodel`` and plain ``auto_round`` store them as they are, ``auto_round:auto_awq`` is AWQ's.
``extra_config`` has settings of single modules, by whole names or by patterns that are searched for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError, UnsupportedError

METHODS = ("auto-round", "autoround", "intel/auto-round")
_GPTQ = {
    "auto": "gptq",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
"""Packing formats with GPTQ's tensors, and how each stores zero points."""
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_PLAIN_BITS = 16
_NAME = re.compile(r"[\w.-]+")


def is_autoround(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a model quantised with AutoRound."""
    keys = config.get("quantization_config")
    return isinstance(keys, Mapping) and str(keys.get("quant_method")).lower() in METHODS


def is_awq_packed(keys: Mapping[str, Any]) -> bool:
    """Return whether AutoRound's ``quantization_config`` names AWQ's layout."""
    return _packing(keys) in _AWQ


def gptq_settings(keys: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return AutoRound's ``quantization_config`` in the words of GPTQ's."""
    require_weights_only(keys, where)
    packing = _packing(keys)
    if packing not in _GPTQ:
        raise UnsupportedError(
            f"AutoRound's packing_format {packing[:60]!r} is not read",
            where=where,
            hint=f"supported: {', '.join((*_GPTQ, *_AWQ))}",
        )
    found = {
        "quant_method": "gptq",
        "bits": keys.get("bits"),
        "group_size": keys.get("group_size"),
        "sym": keys.get("sym") is not False,  # null, too, is symmetric there
        "desc_act": False,
        "checkpoint_format": _GPTQ[packing],
    }
    rules = _rules(keys.get("extra_config"), where)
    return found | ({"dynamic": rules} if rules else {})


def require_weights_only(keys: Mapping[str, Any], where: Path) -> None:
    """Require integer weights, and activations that are not quantised."""
    kind, activations = keys.get("data_type", "int"), keys.get("act_bits")
    if kind not in (None, "int"):
        raise UnsupportedError(
            f"AutoRound's data_type {str(kind)[:40]!r} is not read", where=where, hint="supported: integers"
        )
    if isinstance(activations, int) and activations < _PLAIN_BITS:
        raise UnsupportedError(
            f"AutoRound's activations of {activations} bits are not read",
            where=where,
            hint="supported: models of which only the weights are quantised",
        )


def _packing(keys: Mapping[str, Any]) -> str:
    """Return ``packing_format``; older versions named a backend of that form: auto_round:gptq:exllamav2."""
    named = str(keys.get("packing_format") or keys.get("backend") or "auto").lower()
    return ":".join(named.split(":")[:2])


def _rules(extra: Any, where: Path) -> dict[str, dict[str, Any]]:
    """Return ``extra_config`` as ``dynamic``: whole names first, as they win over patterns there."""
    if not extra:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(own, Mapping) for own in extra.values()):
        raise ModelError(
            "extra_config of quantization_config is not an object of settings by module",
            where=where,
            hint="copy config.json again",
        )
    names = [key for key in extra if _NAME.fullmatch(key)]
    rules: dict[str, dict[str, Any]] = {}
    for key in (*names, *(key for key in extra if key not in names)):
        pattern = f"{re.escape(key)}$" if key in names else f".*(?:{key})"
        own = {name: extra[key][name] for name in ("bits", "group_size", "sym") if name in extra[key]}
        if isinstance(own.get("bits"), int) and own["bits"] >= _PLAIN_BITS:
            rules[f"-:{pattern}"] = {}
        else:
            rules[f"+:{pattern}"] = own
    return rules
