"""Say which modules of a checkpoint are quantised, and how: ``dynamic`` and its like.

``dynamic`` maps patterns to settings: the first pattern that matches a module's whole name from its start
counts; ``-:`` says that the module is not quantised, anything else that these settings take the place of the
common ones. GPTQModel matches names as they are in the files, vLLM and SGLang those of their own modules, in
which q, k and v (gate and up, …) are one. So every rule is written with ``.*`` in front, and under both
names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Modules of vLLM and SGLang, and those of the files that are one in them."""
_ALWAYS = ("embed_tokens",)
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.\w+$")
NESTED = "model.language_model."


def rule_for(dynamic: Mapping[str, Mapping[str, Any]], module: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return the first rule for a module, its pattern and its settings; None: no rule matches.

    Args:
        dynamic: patterns, in their order.
        module: its name in the language model; in the files of a vision-language model it may be nested.
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
) -> dict[str, dict[str, Any]]:
    """Return a complete ``dynamic``: what is not quantised first, then what has bits of its own.

    Args:
        kept: names within a block of the modules that are not quantised.
        bits: of each linear that is, by its name within a block.
        common: the bits of all others.
        settings: what a rule has to repeat beside its bits: group size, symmetry, order.
        beside: what lies beside the language model: ``mtp``, ``visual``.
    """
    rules: dict[str, dict[str, Any]] = {f"-:.*{name}.*": {} for name in (*beside, *_ALWAYS)}
    rules |= {f"-:{pattern}": {} for pattern in patterns(kept, bits)}
    for width in sorted(set(bits.values()) - {common}):
        own = [name for name, other in bits.items() if other == width]
        for pattern in patterns(own, {name: other for name, other in bits.items() if other != width}):
            rules[f"+:{pattern}"] = {"bits": width, **settings}
    return rules


def patterns(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return patterns that match these modules in any block, and none of the others."""
    leaves: dict[str, list[str]] = {}
    experts = set()
    for module in modules:
        if (expert := _EXPERT.fullmatch(module)) is not None:
            experts.add(expert[1])
            continue
        parent, _, leaf = module.rpartition(".")
        leaves.setdefault(parent, []).append(leaf)
    taken = set(others)
    found = [rf".*\.{re.escape(parent)}(\..*)?$" for parent in sorted(experts)]
    for parent, own in leaves.items():
        names = list(dict.fromkeys(own))
        for fused, parts in _FUSED.items():
            if any(part in names for part in parts) and not any(
                f"{parent}.{part}" in taken for part in parts
            ):
                names.append(fused)
        inner = re.escape(names[0]) if len(names) == 1 else f"({'|'.join(map(re.escape, names))})"
        found.append(rf".*\.{re.escape(parent)}\.{inner}$" if parent else rf".*\.{inner}$")
    return found


def module_groups(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Return ``modules_in_block_to_quantize``: names within a block, those that share an input together.

    vLLM looks for these names in those of its modules; it has one for all experts of a block.
    """
    found: list[list[str]] = []
    for group in groups:
        names = list(dict.fromkeys(m[1] if (m := _EXPERT.fullmatch(name)) else name for name in group))
        if names not in found:
            found.append(names)
    return found
