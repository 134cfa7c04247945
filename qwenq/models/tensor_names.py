"""Translate the names of tensors in files into those of transformers' model, by transformers' own rules.

Some architectures are published under other names than transformers' modules have: a Mixtral's experts are
``block_sparse_moe.experts.0.w1``. Names alone are translated here: a rule that also changes values (it
transposes, permutes, splits) is refused where it would apply, as the files would then be read wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenq.errors import UnsupportedError

_EXPERTS_OF = {
    ("gate_up_proj", "MergeModulelist", "Concatenate"): ("gate_proj", "up_proj"),
    ("down_proj", "MergeModulelist"): ("down_proj",),
}
"""Of rules that only stack experts: the target and the operations → the expert's linears, in their order."""
_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


def model_names(model_type: str, folder: Path | None = None) -> Callable[[str], str]:
    """Return a function from a name in the files to that in transformers' model, experts apart.

    Args:
        model_type: of config.json.
        folder: for messages.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    rules = [_rule(transform, folder) for transform in get_checkpoint_conversion_mapping(model_type) or ()]

    def translate(name: str) -> str:
        for rule in rules:
            name = rule(name)
        return name

    return translate


def _rule(transform: Any, folder: Path | None) -> Callable[[str], str]:
    """Return one rule of transformers as a function of names; it raises where values would change."""
    operations = [type(operation).__name__ for operation in getattr(transform, "operations", None) or ()]
    if not operations:
        return lambda name: str(transform.rename_source_key(name)[0])
    targets, sources = transform.target_patterns, transform.source_patterns
    linears = _EXPERTS_OF.get((targets[0].rpartition(".")[2].rstrip("$"), *operations))
    found = [_EXPERT.search(source) for source in sources]
    if len(targets) == 1 and linears is not None and len(linears) == len(sources) and all(found):
        own = {match[1]: linear for match, linear in zip(found, linears, strict=True) if match is not None}
        leaves = re.compile(rf"(.*\.experts\.\d+)\.({'|'.join(map(re.escape, own))})(\.\w+)")

        def rename(name: str) -> str:
            if (match := leaves.fullmatch(name)) is None:
                return name
            return f"{match[1]}.{own[match[2]]}{match[3]}"

        return rename

    def refuse(name: str) -> str:
        if transform.rename_source_key(name)[1] is not None:
            raise UnsupportedError(
                f"transformers changes the values of {name} as it loads them ({', '.join(operations)})",
                where=folder,
                hint="this architecture's files are not read here: only names are translated",
            )
        return name

    return refuse
