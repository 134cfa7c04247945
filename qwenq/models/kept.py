"""Choose what of a block is quantised, and name the reason for what stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from qwenq.errors import UnsupportedError

KEPT: tuple[tuple[str, str], ...] = (
    (r"\.gate$|\.router$", "the router: a few rows that choose the experts"),
    (r"shared_expert_gate$", "one row, which weighs the shared expert"),
    (r"linear_attn\.in_proj_(a|b|ba)$", "a row a head: decay and strength of a recurrent state"),
    (r"conv1d$", "a short depthwise convolution, no linear layer"),
)
"""Patterns of modules by their name in a block, and why they stay as they are. The first match counts."""


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a block that are quantised, by name, in definition order."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and _reason(name) is None
    }


def kept_of(block: nn.Module) -> dict[str, str]:
    """Return the parameters of a block with two dimensions or more that stay as they are: name → reason."""
    linears = linears_of(block)
    kept = {}
    for name, parameter in block.named_parameters():
        module, _, leaf = name.rpartition(".")
        if parameter.ndim < 2 or (module in linears and leaf == "weight"):
            continue
        reason = _reason(module)
        if reason is None:
            raise UnsupportedError(
                f"{name} {list(parameter.shape)} of a {type(block).__name__} is no linear layer, and no rule "
                "says that it may stay as it is",
                hint="this architecture is not supported yet",
            )
        kept[name] = reason
    return kept


def summary(kept: Iterable[dict[str, str]]) -> str | None:
    """Return one line for the user on what stays unquantised in all blocks; None: nothing does."""
    counts: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for of_block in kept:
        for name, reason in of_block.items():
            short = name.removesuffix(".weight")
            counts[short] = counts.get(short, 0) + 1
            reasons[short] = reason
    if not counts:
        return None
    parts = [f"{name} in {count} layers ({reasons[name]})" for name, count in counts.items()]
    return f"not quantised: {'; '.join(parts)}"


def _reason(module: str) -> str | None:
    return next((reason for pattern, reason in KEPT if re.search(pattern, f".{module}")), None)
